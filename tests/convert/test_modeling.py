"""The exported model's class: a padded batch computes what its rows do alone, and the rest is refused."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.common import SHAPES
from tests.model.common import tokens_of as any_tokens_of
from tostlm.convert.cache_tost import TostCache
from tostlm.convert.configuration_tost import TostConfig
from tostlm.convert.modeling_tost import TostForCausalLM
from tostlm.model import ModelConfig, create_lm

EOS = 1
LENGTHS = (7, 12, 1, 4)  # of the rows' own tokens, of 12


def tokens_of(config: ModelConfig, B: int, T: int) -> Tensor:
    """Random tokens without the special ones, which transformers would take for padding."""
    return any_tokens_of(config, B, T).clamp_min(2)


def model_of(config: ModelConfig) -> TostForCausalLM:
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": 0}
    model = TostForCausalLM(TostConfig(**dataclasses.asdict(config), **special))
    model.lm.load_state_dict(create_lm(config, seed=0).state_dict())
    return model.eval()


shapes = pytest.mark.parametrize("config", list(SHAPES.values()), ids=list(SHAPES))
some = pytest.mark.parametrize("config", [SHAPES["tost"], SHAPES["gpt2"], SHAPES["cross, modern"]])


def padded(config: ModelConfig, side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch of four rows, its mask, and the rows alone."""
    rows = [row[:n] for row, n in zip(tokens_of(config, len(LENGTHS), 12), LENGTHS, strict=True)]
    tokens, mask = torch.zeros(len(rows), 12, dtype=torch.long), torch.zeros(len(rows), 12, dtype=torch.long)
    for n, row in enumerate(rows):
        places = {"left": range(12 - len(row), 12), "right": range(len(row)), "within": range(0, 12, 12 // len(row))}
        where = list(places[side])[: len(row)]
        tokens[n, where], mask[n, where] = row, 1
    return tokens, mask, rows


@shapes
@pytest.mark.parametrize("side", ["left", "right", "within"])
@torch.no_grad()
def test_a_padded_batch_equals_its_rows_alone(config: ModelConfig, side: str) -> None:
    model, (tokens, mask, rows) = model_of(config), padded(config, side)
    output = model(tokens, attention_mask=mask)
    more = tokens_of(config, len(rows), 3)
    wider = torch.cat([mask, torch.ones_like(more)], 1)
    after = model(more, attention_mask=wider, past_key_values=output.past_key_values)
    for n, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(output.logits[n, mask[n] == 1], alone.logits[0], rtol=1e-4, atol=1e-5)
        following = model(more[n : n + 1], past_key_values=alone.past_key_values)
        torch.testing.assert_close(after.logits[n], following.logits[0], rtol=1e-4, atol=1e-5)


@some
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation_from_padded_prompts_equals_each_alone(
    config: ModelConfig, side: str, options: dict[str, Any]
) -> None:
    model, (tokens, mask, rows) = model_of(config).double(), padded(config, side)  # so that beams do not tie
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    written = model.generate(tokens, attention_mask=mask, **asked)[:, 12:]
    for n, row in enumerate(rows):
        assert written[n].tolist() == model.generate(row[None], **asked)[0, len(row) :].tolist()


@some
def test_the_loss_of_a_padded_batch_is_the_mean_over_its_rows_tokens(config: ModelConfig) -> None:
    model = model_of(config)
    for side in ("left", "right"):
        tokens, mask, rows = padded(config, side)
        losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]
        found = model(tokens, attention_mask=mask, labels=tokens).loss
        torch.testing.assert_close(found, torch.cat(losses).mean())


@some
@torch.no_grad()
def test_a_cache_is_continued(config: ModelConfig) -> None:
    model, tokens = model_of(config).double(), tokens_of(config, 2, 20)
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, **asked)
    cache = model(tokens[:, :15]).past_key_values
    assert (cache.get_seq_length(), cache.nbytes > 0) == (15, True)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **asked), expected)
    assert torch.equal(model.generate(tokens, past_key_values=TostCache(), **asked), expected)
    cache = model(tokens).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = model(tokens[[1, 0], :1], past_key_values=cache).logits
    apart = model(torch.cat([tokens[[1, 0]], tokens[[1, 0], :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(swapped, apart, rtol=1e-4, atol=1e-5)
    cache.crop(20)
    with pytest.raises(ValueError, match="a state of 20 tokens cannot be cut to 19; read the tokens again"):
        cache.crop(19)
    cache.reset()
    assert cache.get_seq_length() == 0


@some
@torch.no_grad()
def test_embeddings_hidden_states_and_single_logits(config: ModelConfig) -> None:
    model, (tokens, mask, _) = model_of(config), padded(config, "left")
    whole = model(tokens, attention_mask=mask, output_hidden_states=True)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask)
    torch.testing.assert_close(embedded.logits, whole.logits)
    assert len(whole.hidden_states) == config.depth + 1
    assert all(hidden.shape == (4, 12, config.width) for hidden in whole.hidden_states)
    torch.testing.assert_close(model.lm.logits(whole.hidden_states[-1]), whole.logits)
    kept = model(tokens, attention_mask=mask, logits_to_keep=torch.tensor([2, 11])).logits
    torch.testing.assert_close(kept, whole.logits[:, [2, 11]])
    torch.testing.assert_close(model(tokens, attention_mask=mask, logits_to_keep=3).logits, whole.logits[:, -3:])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    torch.testing.assert_close(model(tokens, attention_mask=mask, position_ids=positions).logits, whole.logits)
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    from_tokens = model.generate(tokens, attention_mask=mask, **asked)[:, 12:]
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **asked), from_tokens)


@some
def test_gradient_checkpointing_changes_no_gradient(config: ModelConfig) -> None:
    tokens, gradients = tokens_of(config, 2, 16), []
    for enable in (False, True):
        model = model_of(config).train()
        if enable:
            model.activation_checkpointing_enable()
        assert model.gradient_checkpointing == enable
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@shapes
def test_a_model_from_its_config_is_initialized_as_in_training(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = TostForCausalLM(TostConfig(**dataclasses.asdict(config)))
    tokens = tokens_of(config, 4, 50)
    assert float(model(tokens, labels=tokens).loss.detach()) == pytest.approx(math.log(config.vocab_size), abs=0.5)
    torch.manual_seed(0)
    again = TostForCausalLM(TostConfig(**dataclasses.asdict(config)))
    drawn = [create_lm(config, seed).state_dict() for seed in (1, 2)]
    for name, own in model.lm.state_dict().items():
        assert torch.equal(own, again.lm.state_dict()[name])
        if torch.equal(drawn[0][name], drawn[1][name]):  # no seed changes it
            assert torch.equal(own, drawn[0][name]), name
        else:
            spread = drawn[0][name].abs().max()
            assert 0.2 * spread < own.abs().max() < 5 * spread, name


def test_what_cannot_be_computed_is_refused() -> None:
    config = SHAPES["tost"]
    model, (tokens, mask, _) = model_of(config), padded(config, "left")
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="not after tokens that were read already"):
        model(tokens, attention_mask=torch.cat([torch.ones_like(mask), mask], 1), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids are not those that follow from attention_mask"):
        model(tokens, attention_mask=mask, position_ids=torch.arange(12)[None])
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
        model(attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(tokens, attention_mask=torch.ones(4, 1, 12, 12)[:, :, :, :])


def test_assisted_generation_is_refused() -> None:
    """It would roll back what was read."""
    model = model_of(SHAPES["tost"])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(torch.arange(3, 9)[None], assistant_model=model_of(SHAPES["tost"]), max_new_tokens=4)
