"""One forward for every use: a context read at once, in pieces or token by token gives the same logits."""

import itertools
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.model.common import SHAPES, SOFTMAX, TSSA, double, shapes, tokens_of
from tostlm.model import IGNORE, LM, MixerOptions, ModelConfig, count_parameters, create_lm, training_flops_per_token
from tostlm.model.loss import CPU, Sizes


@shapes
@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 49), max_size=4))
def test_pieces_equal_the_whole(config: ModelConfig, cuts: set[int]) -> None:
    lm, tokens = create_lm(config, seed=0), tokens_of(config, 2, 50)
    whole, end = lm(tokens)
    state, pieces = None, []
    for start, stop in itertools.pairwise([0, *sorted(cuts), 50]):
        logits, state = lm(tokens[:, start:stop], state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert state is not None
    for a, b in zip(itertools.chain(*state.layers), itertools.chain(*end.layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@shapes
def test_single_steps_equal_the_whole(config: ModelConfig) -> None:
    lm, tokens = create_lm(config, seed=0), tokens_of(config, 2, 20)
    state, steps = None, []
    for token in tokens.split(1, dim=1):
        logits, state = lm(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), lm(tokens)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tost", "tost, selective", "gpt2", "cross, plain"])
@torch.no_grad()
def test_beyond_learned_positions_the_last_one_may_be_used(name: str) -> None:
    config, tokens = SHAPES[name], tokens_of(SHAPES[name], 2, 90)
    lm, longer = create_lm(config, seed=0), create_lm(replace(config, positions=90), seed=1)
    weights = lm.state_dict()
    for key, own in longer.state_dict().items():  # position tables alone are longer
        value = weights[key]
        own.copy_(value if own.shape == value.shape else value[torch.arange(90).clamp(max=63)])
    expected, _ = longer(tokens)
    with pytest.raises(ValueError, match="longer than the model's 64 positions"):
        lm(tokens)
    lm.clamps_positions = True
    whole, _ = lm(tokens)
    first, state = lm(tokens[:, :70])
    for found in (whole, torch.cat([first, lm(tokens[:, 70:], state)[0]], 1)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@shapes
def test_the_mixer_matters_and_the_future_does_not(config: ModelConfig) -> None:
    lm, tokens = create_lm(config, seed=0), tokens_of(config, 1, 30)
    before, after = tokens.clone(), tokens.clone()
    before[0, 3] = (before[0, 3] + 1) % config.vocab_size
    after[0, 20:] = 0
    logits = lm(tokens)[0]
    assert not torch.equal(lm(before)[0][0, 10], logits[0, 10])
    torch.testing.assert_close(lm(after)[0][0, :20], logits[0, :20])


def test_a_tost_context_is_remembered_in_2c_plus_h_numbers_a_layer() -> None:
    config = SHAPES["tost, forgetting, no positions"]
    lm = create_lm(config, seed=0)
    sizes = {lm(tokens_of(config, 1, T))[1].nbytes for T in (1, 100, 700)}
    assert sizes == {config.depth * (2 * config.width + config.heads) * 8}


@shapes
def test_loss_is_the_cross_entropy_of_the_logits(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tostlm.model.loss.CPU", Sizes(7 * 4 * config.vocab_size, 3 * 4 * config.vocab_size)
    )  # of 60 rows
    lm, tokens = create_lm(config, seed=0), tokens_of(config, 2, 30)
    targets = tokens_of(config, 2, 30, seed=1)
    targets[0, :11] = IGNORE
    parameters = list(lm.parameters())
    loss, _ = lm(tokens, targets=targets)
    expected = F.cross_entropy(lm(tokens)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_softcap_and_z_loss_are_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tostlm.model.loss.CPU", Sizes(7 * 8 * 40, 3 * 8 * 40))
    config = replace(SHAPES["tost"], logit_softcap=0.3, z_loss=0.1)
    lm, tokens, targets = double(config), tokens_of(config, 2, 30), tokens_of(config, 2, 30, seed=1)
    targets[0, :11] = IGNORE
    raw = lm.hidden(tokens)[0] @ lm.embed.weight.t()
    logits = 0.3 * torch.tanh(raw / 0.3)
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    z = logits.logsumexp(-1)[targets != IGNORE].square().mean()
    torch.testing.assert_close(lm(tokens)[0], logits)
    expected, (loss, _) = entropy + 0.1 * z, lm(tokens, targets=targets)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(result, list(lm.parameters())) for result in (loss, expected))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(lm.eval()(tokens, targets=targets)[0], entropy)  # perplexity has no z-loss


def test_an_untied_output_projection_starts_at_zero() -> None:
    config = replace(SHAPES["tost"], tie_embeddings=False)
    lm, tokens = create_lm(config, 0), tokens_of(config, 2, 30)
    assert (lm(tokens)[0] == 0).all()
    assert count_parameters(config) - count_parameters(SHAPES["tost"]) == config.vocab_size * config.width


def test_targets_may_be_of_the_last_tokens_alone() -> None:
    config = SHAPES["tost"]
    lm, tokens, targets = create_lm(config, 0), tokens_of(config, 2, 30), tokens_of(config, 2, 30, seed=1)
    masked = targets.clone()
    masked[:, :-8] = IGNORE
    torch.testing.assert_close(lm(tokens, targets=targets[:, -8:])[0], lm(tokens, targets=masked)[0])


def test_the_loss_of_a_bf16_model_is_not_rounded_to_bf16() -> None:
    config = SHAPES["gpt2"]
    lm = create_lm(config, 0).to(torch.bfloat16)
    tokens, targets = tokens_of(config, 2, 60), tokens_of(config, 2, 60, seed=1)
    loss, _ = lm(tokens, targets=targets)
    expected = F.cross_entropy(lm(tokens)[0].float().flatten(0, 1), targets.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_the_loss_has_no_second_derivative() -> None:
    lm = create_lm(SHAPES["gpt2"], 0)
    tokens = tokens_of(lm.config, 2, 30)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(lm(tokens, targets=tokens)[0], lm.embed.weight, create_graph=True)


def test_the_loss_makes_no_gradients_where_none_is_wanted() -> None:
    lm, products = create_lm(SHAPES["gpt2"], 0), 0
    tokens = tokens_of(lm.config, 2, 30)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal products
            products += function.overloadpacket.__name__ == "mm" and lm.config.vocab_size in args[1].shape
            return function(*args, **(kwargs or {}))

    with Count(), torch.no_grad():
        lm(tokens, targets=tokens)
    assert products == 1


def test_logits_never_take_context_times_vocabulary() -> None:
    """100,000 tokens x 50,000 pieces would be 20 GB."""
    config = ModelConfig(1, 8, 1, 50_000, positions=None, layers=TSSA)
    lm, tokens = create_lm(config, 0), tokens_of(config, 1, 2_000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        lm(tokens, targets=tokens)[0].backward()
    assert largest <= CPU.logits // 4


@shapes
def test_a_context_beyond_the_positions_is_refused(config: ModelConfig) -> None:
    lm = create_lm(config, 0)
    if config.positions is None:
        lm(tokens_of(config, 1, 200))
        return
    _, state = lm(tokens_of(config, 1, 60))
    with pytest.raises(ValueError, match="context of 65 tokens is longer than the model's 64 positions"):
        lm(tokens_of(config, 1, 5), state)


def test_states_of_chosen_sequences() -> None:
    config = SHAPES["hybrid"]
    lm, tokens = create_lm(config, 0), tokens_of(config, 3, 20)
    _, state = lm(tokens)
    rows = torch.tensor([2, 0])
    next_tokens = tokens_of(config, 2, 1)
    found, _ = lm(next_tokens, state.select(rows))
    expected, _ = lm(torch.cat([tokens[rows], next_tokens], 1))
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_flops_do_not_charge_tssa_for_the_context() -> None:
    def at(context: int, layers: tuple[MixerOptions, ...]) -> float:
        return training_flops_per_token(ModelConfig(12, 768, 12, 50304, 1024, layers), context)

    assert at(1024, TSSA) == at(1_000_000, TSSA)
    assert at(4096, SOFTMAX) - at(2048, SOFTMAX) == 12 * 3 * 2 * 768 * 2048
    assert at(1024, TSSA) == pytest.approx(6 * count_parameters(ModelConfig(12, 768, 12, 50304, None, TSSA)), rel=0.01)


def test_a_model_on_the_meta_device_is_free() -> None:
    with torch.device("meta"):
        assert LM(ModelConfig(100, 4096, 32, 50304, 1024, TSSA)).embed.weight.is_meta


def test_shapes_of_public_functions_are_checked_in_tests() -> None:
    lm = create_lm(SHAPES["tost"], 0)
    with pytest.raises(jaxtyping.TypeCheckError):
        lm(torch.zeros(5, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError):
        lm(torch.zeros(2, 5))
