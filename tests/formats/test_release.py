"""Checkpoints of the ToST release and nanoGPT are read, and computed as the release's equations say."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import load_checkpoint
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.formats import read_foreign

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 512}


def state_dict(tssa: bool, bias: bool, gains: bool = True) -> dict[str, Tensor]:
    """The tensors of the release's model, by its names and in its shapes."""
    C, T, H = SHAPE["n_embd"], SHAPE["block_size"], SHAPE["n_head"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (512, C), "transformer.wpe.weight": (T, C)}
    for layer in range(SHAPE["n_layer"]):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (C,),
            "attn.c_attn.weight": (C if tssa else 3 * C, C),
            "attn.c_proj.weight": (C, C),
            "ln_2.weight": (C,),
            "mlp.c_fc.weight": (4 * C, C),
            "mlp.c_proj.weight": (C, 4 * C),
        }
        if bias:
            block |= {name.replace("weight", "bias"): shape[:1] for name, shape in block.items()}
        block |= {"attn.temp": (H, 1), "attn.denom_bias": (H, T, 1)} if tssa else {}
        block |= {"gamma1": (C,), "gamma2": (C,)} if gains else {}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"transformer.ln_f.weight": (C,)} | ({"transformer.ln_f.bias": (C,)} if bias else {})
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def release_equations(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits [B, T, V] in float64, whole sequences at a time, from the release's equations."""
    w = {name: tensor.double() for name, tensor in state.items()}
    H, T = SHAPE["n_head"], tokens.shape[1]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w.get(f"{name}.bias", torch.zeros(1))

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(1))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, -1)).transpose(1, 2)

    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
    for layer in range(SHAPE["n_layer"]):
        at = f"transformer.h.{layer}."
        y = linear(f"{at}attn.c_attn", norm(f"{at}ln_1", x))
        if f"{at}attn.temp" in w:
            z = heads(y)
            n = (z**2 / (z**2).cumsum(2).clamp_min(1e-12) + w[f"{at}attn.denom_bias"][:, :T]).sum(-1)
            Pi = (n * w[f"{at}attn.temp"]).softmax(1)[..., None]
            dots = (z**2 * Pi).cumsum(2) / (Pi.cumsum(2) + 1e-8)
            y = -z * Pi / (1 + dots)
        else:
            q, k, v = map(heads, y.chunk(3, -1))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            y = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v
        y = linear(f"{at}attn.c_proj", y.transpose(1, 2).flatten(2))
        x = x + w.get(f"{at}gamma1", torch.ones(1)) * y
        y = F.gelu(linear(f"{at}mlp.c_fc", norm(f"{at}ln_2", x)))
        x = x + w.get(f"{at}gamma2", torch.ones(1)) * linear(f"{at}mlp.c_proj", y)
    return norm("transformer.ln_f", x) @ w["transformer.wte.weight"].t()


def save(folder: Path, tokenizer: Tokenizer, state: dict[str, Tensor], **others: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / tokenizer.file_name).write_bytes(tokenizer.content)
    saved = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": SHAPE | {"bias": "transformer.ln_f.bias" in state, "dropout": 0.0},
        "iter_num": 123,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "openwebtext"},
        **others,
    }
    torch.save(saved, folder / "ckpt.pt")
    return folder / "ckpt.pt"


TOKENS = torch.randint(512, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("tssa", "bias", "gains"), [*itertools.product([True, False], [True, False], [True]), (False, True, False)]
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@torch.no_grad()
def test_its_models_compute_what_its_equations_say(
    tokenizer: Tokenizer, tmp_path: Path, tssa: bool, bias: bool, gains: bool, prefix: str
) -> None:
    state = state_dict(tssa, bias, gains)
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    named |= {f"{prefix}transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24)} if not tssa else {}  # a mask
    file = save(tmp_path / "out", tokenizer, named)
    expected = release_equations(state, TOKENS)
    for path in (file, file.parent):
        checkpoint = load_checkpoint(path)
        logits = checkpoint.lm(TOKENS)[0]
        assert (logits - expected).abs().max() < 1e-5 * expected.std()
        assert checkpoint.tokenizer.sha256 == tokenizer.sha256


def test_other_weights_are_other_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """By which a stored state is told from another model's."""
    state = state_dict(True, False)
    file = save(tmp_path / "out", tokenizer, state)
    before = load_checkpoint(file).content, load_checkpoint(file.parent).content
    save(tmp_path / "out", tokenizer, state | {"transformer.ln_f.weight": torch.ones(16)})
    after = load_checkpoint(file).content, load_checkpoint(file.parent).content
    assert before[0] != after[0] and before[1] != after[1]


def test_an_older_file_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = save(tmp_path, tokenizer, state_dict(True, False))
    saved = torch.load(file)
    torch.save(saved, file, _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(file).lm.embed.weight, saved["model"]["transformer.wte.weight"])


def test_every_command_takes_it(tokenizer: Tokenizer, data: Path, tmp_path: Path) -> None:
    file = str(save(tmp_path / "out", tokenizer, state_dict(True, False)))
    succeed(tostlm("generate", file, "--tokens", "3"))
    succeed(tostlm("eval", "perplexity", file, "--contexts", "8,16", "--data", str(data)))
    assert (tmp_path / "out" / "perplexity.json").exists()
    succeed(tostlm("convert", file, "--to", "hf", str(tmp_path / "hf")))
    fail(tostlm("checkpoint", "average", file, file, "--out", str(tmp_path / "x")), "a model of another format")


@pytest.mark.parametrize(("tssa", "bias", "gains"), [(True, False, True), (False, True, False)])
def test_it_becomes_a_checkpoint_and_comes_back_bit_for_bit(
    tokenizer: Tokenizer, tmp_path: Path, tssa: bool, bias: bool, gains: bool
) -> None:
    state = state_dict(tssa, bias, gains)
    file = save(tmp_path / "out", tokenizer, state)
    said = succeed(tostlm("convert", str(file), "--to", "tostlm", str(tmp_path / "own")))
    assert "logits of whole documents: " in said
    succeed(tostlm("convert", str(tmp_path / "own"), "--to", "release", str(tmp_path / "back")))
    back = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)
    ones = {name for name in back["model"] if name.endswith(("gamma1", "gamma2"))} - state.keys()
    assert all(bool((back["model"][name] == 1).all()) for name in ones)
    assert back["model"].keys() - ones == state.keys()
    assert all(torch.equal(back["model"][name], state[name]) for name in state)
    assert back["model_args"] == SHAPE | {"bias": bias, "dropout": 0.0, "TSSA": tssa}
    again = read_foreign(tmp_path / "back")
    assert (again.config.layer_scale is None) == (not gains)


def test_it_is_trained_on(tokenizer: Tokenizer, run: Run, data: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "out", tokenizer, state_dict(True, False))
    succeed(tostlm("convert", str(file), "--to", "tostlm", str(tmp_path / "own")))
    config, new = str(tmp_path / "own" / "config.yaml"), tmp_path / "new"
    smaller = ["train.steps=2", "train.batch_tokens=96", "optimizer.warmup_steps=0", "train.eval_tokens=96"]
    here = [f"run_dir={new}", f"data.path={data}", "deepspeed.torch_autocast.enabled=false", "train.log_every_steps=1"]
    for more in ([], ["train.steps=4"]):  # and resumed
        succeed(tostlm("train", config, *smaller, *here, "--from", str(tmp_path / "own"), *more))
    begun = json.loads((new / "checkpoints" / "step-00000000" / "train_state.json").read_text())
    assert (begun["step"], begun["branched_from"]) == (0, str(tmp_path / "own"))
    expected = torch.load(file)["model"]["transformer.h.1.mlp.c_fc.weight"]
    first, last = (load_checkpoint(new / "checkpoints" / f"step-0000000{step}") for step in (0, 4))
    assert torch.equal(first.lm.blocks[1].mlp.in_proj.weight, expected)
    assert 0 < (last.lm.blocks[1].mlp.in_proj.weight - expected).abs().max() < 0.02
    elsewhere = [f"run_dir={tmp_path}/other", "--from", str(file)]
    fail(tostlm("train", config, *smaller, *here, *elsewhere), "a model of another format; make a checkpoint of it")


class Trap:
    """What a pickle runs when it is opened carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_code_in_a_file_is_not_executed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    file = save(tmp_path / "out", tokenizer, state_dict(True, False), extra=Trap(mark))
    with pytest.raises(UserError, match="holds more than tensors and plain values, or is damaged; nothing in it was"):
        load_checkpoint(file)
    file.write_bytes(pickle.dumps({"model": Trap(mark)}))
    fail(tostlm("generate", str(file), "--tokens", "1"), "nothing in it was executed")
    assert not mark.exists()
    torch.load(save(tmp_path / "out", tokenizer, {}, extra=Trap(mark)), weights_only=False)
    assert mark.exists()  # so that the trap is one


def test_mistakes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def refused(message: str, state: dict[str, Tensor] | None = None, **others: Any) -> None:
        file = save(tmp_path / "out", tokenizer, state_dict(True, False) if state is None else state, **others)
        with pytest.raises(UserError, match=message):
            load_checkpoint(file)

    state = state_dict(True, False)
    refused("has no tensor transformer.h.1.gamma2", {n: t for n, t in state.items() if n != "transformer.h.1.gamma2"})
    refused(
        "has tensors that its model does not: transformer.h.0.extra", state | {"transformer.h.0.extra": torch.ones(1)}
    )
    refused(
        r"attn.temp is \(2,\) torch.float32; its model has \(2, 1\)",
        state | {"transformer.h.0.attn.temp": torch.ones(2)},
    )
    wide = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    refused("wte.weight is .* torch.float8_e4m3fn; its model has .* numbers in fp16", wide)
    refused("attn.temp is no plain tensor", state | {"transformer.h.0.attn.temp": torch.ones(2, 1).to_sparse()})
    refused("with and without the prefix _orig_mod", state | {"_orig_mod.transformer.ln_f.weight": torch.ones(16)})
    ones = {name: torch.ones(7) for name in state if name.endswith(("gamma1", "gamma2"))}
    refused(r"gamma1 is \(7,\) torch.float32", state | ones)
    refused("model that it does not|its model does not", state | {"evil.gamma1": torch.ones(16)})
    refused("are no shape of a model", model_args=SHAPE | {"n_layer": 10**9})
    refused("are no shape of a model", model_args=SHAPE | {"n_embd": 10**9})
    refused("lm_head.weight is not transformer.wte.weight", state | {"lm_head.weight": torch.zeros(512, 16)})
    refused("has no model and model_args", model_args=None)
    refused("are no shape of a model", model_args={"n_layer": 2})
    refused("are no shape of a model", model_args=SHAPE | {"n_head": 3})
    refused(
        "has 400 tokens and its tokenizer 512",
        model_args=SHAPE | {"vocab_size": 400},
        state={name: tensor[:400] if tensor.shape[0] == 512 else tensor for name, tensor in state.items()},
    )
    file = save(tmp_path / "out", tokenizer, state)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    fail(tostlm("generate", str(file)), "it is no checkpoint, or damaged")
    file.write_bytes(whole)
    (tmp_path / "out" / tokenizer.file_name).rename(tmp_path / "elsewhere.model")
    fail(tostlm("generate", str(file)), "put its tokenizer beside it, or name it with --tokenizer")
    named = ("--tokenizer", str(tmp_path / "elsewhere.model"))
    succeed(tostlm("convert", str(file), "--to", "tostlm", str(tmp_path / "own"), *named))
    fail(tostlm("convert", str(tmp_path / "own"), "--to", "hf", str(tmp_path / "hf"), *named), "leave --tokenizer out")
