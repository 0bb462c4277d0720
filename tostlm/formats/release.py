"""Checkpoints of the ToST release, whose training is nanoGPT's: a ckpt.pt with a state dict and the model's arguments.

Source: https://github.com/RobinWu218/ToST, tost_lang/{train,model,model_TSSA}.py. nanoGPT's own are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tostlm.errors import UserError
from tostlm.formats.naming import ForeignTensor, gpt2_name, require_depth, require_tensor, take_weights
from tostlm.formats.pickles import load_pickle
from tostlm.model import ModelConfig, weight_shapes
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.tssa import TSSAOptions

RELEASE_FILE = "ckpt.pt"
COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module's parameters
MASK = ".attn.bias"  # of an attention without flash
LAYER_SCALE = 1e-5  # what the release starts its gains at


def release_file(path: Path) -> Path | None:
    """Return the file of a checkpoint of the release: a path itself, or a folder's ckpt.pt; None if there is none."""
    if path.suffix in (".pt", ".pth") and path.is_file():
        return path
    return path / RELEASE_FILE if (path / RELEASE_FILE).is_file() else None


def can_be_release(config: ModelConfig) -> bool:
    """Return whether the release's classes hold a model: plain TSSA or plain softmax throughout, and GPT-2's block."""
    plain = ModelConfig(
        config.depth, config.width, config.heads, config.vocab_size, config.positions, config.layers, config.layer_scale
    )
    # What the release has too, or what changes no logits.
    free = {"bias": False, "output_init": "normal", "z_loss": 0.0, "mlp_width": None}
    alike = asdict(config) | free == asdict(plain) and config.mlp_channels == plain.mlp_channels
    mixers = set(config.layer_plan)
    return alike and mixers in ({TSSAOptions()}, {SoftmaxOptions()}) and config.positions is not None


def load_release(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the model_args and the state dict of a ckpt.pt, under the names of the release. Nothing is executed.

    Raises:
        UserError: it is no such checkpoint, is damaged, or holds more than tensors and plain values.
    """
    saved = _load(path)
    arguments, state = saved.get("model_args"), saved.get("model")
    if not isinstance(arguments, Mapping) or not isinstance(state, Mapping):
        raise UserError(f"{path} is no checkpoint of the ToST release or nanoGPT: it has no model and model_args")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise UserError(f"{path}: its model holds more than tensors; it is no checkpoint of the ToST release")
    named = {name.removeprefix(COMPILED): tensor for name, tensor in state.items() if not name.endswith(MASK)}
    if len(named) < sum(not name.endswith(MASK) for name in state):
        raise UserError(f"{path} has a tensor both with and without the prefix {COMPILED}; it is of no one model")
    for name, tensor in named.items():
        require_tensor(tensor, name, tensor.shape, str(path))
    return arguments, named


def read_release(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model of a ckpt.pt and its weights; errors as of `load_release`."""
    arguments, state = load_release(path)
    head, embed = state.pop("lm_head.weight", None), state.get("transformer.wte.weight")
    if head is not None and embed is not None and not torch.equal(head, embed):
        raise UserError(f"{path}: lm_head.weight is not transformer.wte.weight, which the release shares")
    first = "transformer.h.0."
    gains = _gains_of_one(state)
    state = {name: tensor for name, tensor in state.items() if name not in gains}
    try:
        config = ModelConfig(
            depth=arguments["n_layer"],
            width=arguments["n_embd"],
            heads=arguments["n_head"],
            vocab_size=arguments["vocab_size"],
            positions=arguments["block_size"],
            layers=(TSSAOptions() if f"{first}attn.temp" in state else SoftmaxOptions(),),
            layer_scale=LAYER_SCALE if f"{first}gamma1" in state else None,
            bias=f"{first}ln_1.bias" in state,
        )
        require_depth(config, state)
        shapes = weight_shapes(config)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path}: model_args {dict(arguments)!r:.200} are no shape of a model ({error})") from None
    weights = take_weights(state, _foreign_tensors(config), shapes, str(path))
    return config, weights


def _gains_of_one(state: Mapping[str, Tensor]) -> set[str]:
    """Return the names of all gains if every one of every block is one, as `release_state` writes those without."""
    gains = {name for name in state if name.endswith((".gamma1", ".gamma2"))}
    blocks = [name.removesuffix(".ln_1.weight") for name in state if name.endswith(".ln_1.weight")]
    if gains != {f"{block}.{gain}" for block in blocks for gain in ("gamma1", "gamma2")}:
        return set()
    ones = all(state[name].shape == state[f"{name.rpartition('.')[0]}.ln_1.weight"].shape for name in gains)
    return gains if ones and all(bool((state[name] == 1).all()) for name in gains) else set()


def _load(path: Path) -> Mapping[str, Any]:
    advice = "Save its state dict and model_args alone"
    saved = load_pickle(path, "tensors and plain values", advice, "it is no checkpoint, or damaged")
    return saved if isinstance(saved, Mapping) else {}


def release_state(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a model that `can_be_release`; a model without LayerScale gets gains of one."""
    state = {foreign.name: foreign.to_foreign(weights[name]) for name, foreign in _foreign_tensors(config).items()}
    if config.layer_scale is None:
        for layer in range(config.depth):
            for gain in ("gamma1", "gamma2"):
                state[f"transformer.h.{layer}.{gain}"] = weights["norm.weight"].new_ones(config.width)
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def release_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the release's model_args of a model."""
    return {
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_embd": config.width,
        "block_size": config.positions,
        "bias": config.bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
        "TSSA": config.layer_plan[0] == TSSAOptions(),
    }


def _foreign_tensors(config: ModelConfig) -> dict[str, ForeignTensor]:
    found = {}
    for name in weight_shapes(config):
        if name.endswith(".mixer.temp"):
            # [H], there [H, 1]
            found[name] = ForeignTensor(gpt2_name(name), lambda x: x[:, None], lambda x: x[:, 0])
        elif name.endswith(".mixer.bias"):
            # [T, H], there [H, T, 1]
            found[name] = ForeignTensor(gpt2_name(name), lambda x: x.t()[..., None], lambda x: x[..., 0].t())
        else:
            found[name] = ForeignTensor(gpt2_name(name))
    return found
