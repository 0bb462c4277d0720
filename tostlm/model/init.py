"""How a model starts, and which of its parameters decay: the authors' recipe, which is nanoGPT's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM

STD = 0.02


def create_lm(config: ModelConfig, seed: int) -> LM:
    """A model with its starting weights, the same on every machine for one seed."""
    with torch.device("meta"):
        lm = LM(config)
    lm.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            _start(name, parameter, config, generator)
    return lm


def _start(name: str, parameter: nn.Parameter, config: ModelConfig, generator: torch.Generator) -> None:
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind.startswith("scale_"):
        parameter.fill_(config.layer_scale)
    elif kind.startswith("norm") or kind == "temp":
        parameter.fill_(1.0)
    elif kind == "bias":
        parameter.zero_()
    elif kind == "out_proj":  # every block adds two of these to the residual stream
        parameter.normal_(0, STD / math.sqrt(2 * config.layers), generator=generator)
    else:
        parameter.normal_(0, STD, generator=generator)


def parameter_groups(lm: LM, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices and embeddings decay; norms, gains, temperatures and membership biases do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in lm.named_parameters():
        groups[parameter.dim() >= 2 and not name.endswith("mixer.bias")].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    ]
