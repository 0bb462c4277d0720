"""Hugging Face's folders of GPT-2, and those that tostlm exports, are read as they are computed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from tests.conftest import Run, fail, succeed, tostlm
from tests.data.tokenizers import tokenizer_kinds
from tostlm.checkpoint import load_checkpoint
from tostlm.convert import convert, write_hf
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.errors import UserError
from tostlm.model import create_lm

TOKENS = torch.randint(500, (3, 20), generator=torch.Generator().manual_seed(1))


def gpt2_folder(folder: Path, tokenizer: Tokenizer, **fields: Any) -> Any:
    """A folder that transformers writes of a GPT-2 of its own making, and the model."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | fields)).eval()
    for parameter in model.requires_grad_(False).parameters():  # biases start at zero
        parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    (folder / tokenizer.file_name).write_bytes(tokenizer.content)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},  # OpenAI's: the approximate GELU, biases, tied embeddings
        {"activation_function": "gelu", "n_inner": 40},
        {"activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_gpt2_computes_the_same_and_comes_back_bit_for_bit(
    tokenizer: Tokenizer, tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = gpt2_folder(tmp_path / "hf", tokenizer, **fields)
    expected = model(TOKENS).logits
    assert (load_checkpoint(tmp_path / "hf").lm(TOKENS)[0] - expected).abs().max() < 1e-5 * expected.std()
    said = succeed(tostlm("convert", str(tmp_path / "hf"), "--to", "tostlm", str(tmp_path / "own")))
    assert "logits of whole documents: " in said
    convert(load_checkpoint(tmp_path / "own"), tmp_path / "back", write_hf)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back(TOKENS).logits, expected)  # two spellings of the GELU are rounded differently
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_names_as_openai_saved_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of the body alone, with masks, in one file of torch's or in several."""
    model = gpt2_folder(tmp_path / "hf", tokenizer)
    expected = load_checkpoint(tmp_path / "hf").lm.blocks[1].mlp.in_proj.weight
    body = {name: t.contiguous() for name, t in model.transformer.state_dict().items()}
    body |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24) for layer in range(2)}
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(body, tmp_path / "hf" / "pytorch_model.bin")
    assert torch.equal(load_checkpoint(tmp_path / "hf").lm.blocks[1].mlp.in_proj.weight, expected)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    halves = {"a.safetensors": list(body)[::2], "b.safetensors": list(body)[1::2]}
    for file, names in halves.items():
        safetensors.torch.save_file({name: body[name].clone() for name in names}, tmp_path / "hf" / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_checkpoint(tmp_path / "hf").lm.blocks[1].mlp.in_proj.weight, expected)
    (tmp_path / "hf" / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b.safetensors cannot be read"):
        load_checkpoint(tmp_path / "hf")
    index["weight_map"]["h.0.ln_1.weight"] = "../b.safetensors"
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names no weight_map of files beside it"):
        load_checkpoint(tmp_path / "hf")


def test_openais_tokenizer_files(tokenizer: Tokenizer, speeches: list[str], tmp_path: Path) -> None:
    gpt2_folder(tmp_path / "hf", tokenizer)
    (tmp_path / "hf" / tokenizer.file_name).unlink()
    fast = tokenizer_kinds.byte_level(speeches, ["<|endoftext|>"])
    fields = json.loads(fast.to_str())["model"]
    vocabulary, merges = tmp_path / "hf" / "vocab.json", tmp_path / "hf" / "merges.txt"
    vocabulary.write_text(json.dumps(fields["vocab"]))
    merges.write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in fields["merges"]))
    found, theirs = import_tokenizer(tmp_path / "hf"), ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
    for text in [*speeches, "  a\n\n\tb ", "\u6f22\u5b57"]:
        assert found.encode(text) == theirs.encode(text).ids
        assert found.decode(found.encode(text)) == text
    assert found.eos_token == "<|endoftext|>"
    merges.unlink()
    with pytest.raises(UserError, match=r"vocab.json: its merges.txt is not beside it"):
        import_tokenizer(tmp_path / "hf")


@pytest.mark.parametrize("mixer", ["tssa", "softmax"])
def test_an_export_becomes_the_checkpoint_that_it_was(trained: dict[str, Run], tmp_path: Path, mixer: str) -> None:
    """With its config and progress; GPT-2's class has LayerScale folded into matrices, tostlm's as it was."""
    source = load_checkpoint(trained[mixer].dir)
    succeed(tostlm("convert", str(trained[mixer].dir), "--to", "hf", str(tmp_path / "hf"), "--own-class"))
    succeed(tostlm("convert", str(tmp_path / "hf"), "--to", "tostlm", str(tmp_path / "own")))
    back = load_checkpoint(tmp_path / "own")
    for (name, weight), (_, own) in zip(source.lm.named_parameters(), back.lm.named_parameters(), strict=True):
        assert torch.equal(weight, own), name
    assert back.config == source.config
    assert back.tokenizer.content == source.tokenizer.content
    assert back.train_state == source.train_state._replace(imported_from=str(tmp_path / "hf"))
    succeed(tostlm("convert", str(trained[mixer].dir), "--to", "hf", str(tmp_path / "folded")))
    folded = load_checkpoint(tmp_path / "folded")
    assert folded.config.model.layer_scale == (None if mixer == "softmax" else source.config.model.layer_scale)
    torch.testing.assert_close(folded.lm(TOKENS)[0], source.lm(TOKENS)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"},
        {"pad_token_id": "x", "num_labels": "x", "resid_pdrop": "x", "dtype": "nonsense", "return_dict": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["gpt2", "tost"])
def test_other_keys_of_a_config_choose_nothing(
    trained: dict[str, Run], tokenizer: Tokenizer, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    if kind == "gpt2":
        gpt2_folder(tmp_path / "hf", tokenizer)
    else:
        convert(load_checkpoint(trained["tssa"].dir), tmp_path / "hf", write_hf)
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text()) | fields
    config.write_text(json.dumps({key: value for key, value in values.items() if key != "z_loss"}))  # one has a default
    (tmp_path / "hf" / "adapter_config.json").write_text("{")
    succeed(tostlm("convert", str(tmp_path / "hf"), "--to", "tostlm", str(tmp_path / "own")))


def test_a_gpt2_without_biases_comes_back_without(trained: dict[str, Run], tmp_path: Path) -> None:
    source = load_checkpoint(trained["softmax"].dir)
    assert not source.config.model.bias
    succeed(tostlm("convert", str(trained["softmax"].dir), "--to", "hf", str(tmp_path / "hf")))
    back = load_checkpoint(tmp_path / "hf")
    assert back.lm.config == dataclasses.replace(source.lm.config, layer_scale=None)
    assert back.train_state == source.train_state._replace(imported_from=str(tmp_path / "hf"))
    assert back.config.optimizer == source.config.optimizer


def test_code_in_a_folder_is_not_executed(trained: dict[str, Run], tmp_path: Path) -> None:
    folder, mark = tmp_path / "hf", tmp_path / "executed"
    convert(load_checkpoint(trained["tssa"].dir), folder, write_hf)
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n{file.read_text()}")
    succeed(tostlm("convert", str(folder), "--to", "tostlm", str(tmp_path / "own")))
    succeed(tostlm("generate", str(folder), "--tokens", "2"))
    assert not mark.exists()


def test_mistakes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def refused(message: str, **fields: Any) -> None:
        config = tmp_path / "hf" / "config.json"
        if not config.exists():
            gpt2_folder(tmp_path / "hf", tokenizer)
        before = config.read_text()
        config.write_text(json.dumps(json.loads(before) | fields))
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / "hf")
        config.write_text(before)

    refused("holds a model of type llama; tostlm reads gpt2 and its own exports", model_type="llama")
    refused("with scale_attn_by_inverse_layer_idx True tostlm would compute", scale_attn_by_inverse_layer_idx=True)
    refused("with layer_norm_epsilon 0.1 tostlm would compute", layer_norm_epsilon=0.1)
    refused("holds rounded weights, for inference alone; name the checkpoint", quantization_config={"bits": 8})
    refused("activation_function tanh is not known", activation_function="tanh")
    refused("has no tensor transformer.h.2.ln_1.weight; it is damaged", n_layer=3)
    refused("has tensors that its model does not: transformer.h.1", n_layer=1)
    refused("describes no model", n_embd=None)
    refused("describes no model", n_head="many")
    refused("describes no model", n_layer=10**9)
    refused("describes no model", n_embd=10**9)
    refused(r"transformer.wpe.weight is \(24, 16\) torch.float32; its model has \(25, 16\)", n_positions=25)
    refused("has no lm_head.weight, and its embeddings are not tied", tie_word_embeddings=False)
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("model.safetensors cannot be read")
    weights.unlink()
    refused("has none of model.safetensors, pytorch_model.bin; download its weights too")
    (tmp_path / "hf" / "config.json").write_text("[1]")
    fail(tostlm("generate", str(tmp_path / "hf")), "config.json is no JSON object")


def test_a_model_in_bf16_stays_in_bf16(trained: dict[str, Run], tmp_path: Path) -> None:
    source = load_checkpoint(trained["tssa"].dir)
    lm = create_lm(source.config.model, 0).to(torch.bfloat16).eval()
    convert(source._replace(lm=lm), tmp_path / "hf", write_hf)
    back = load_checkpoint(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), back.lm.parameters(), strict=True))
