"""Models from their configs: created and initialized, grouped for the optimizer, and counted.

Initialization and groups are the authors' recipe, which is nanoGPT's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM


def create_lm(config: ModelConfig, seed: int) -> LM:
    """Build a model on the CPU and initialize its weights: the same on every machine for one seed."""
    with torch.device("meta"):
        lm = LM(config)
    lm.to_empty(device="cpu")
    lm.reset_parameters(torch.Generator().manual_seed(seed))
    return lm


def parameter_groups(lm: LM, weight_decay: float) -> list[dict[str, Any]]:
    """Return torch's optimizer groups: "decay", and "no_decay" of norms, gains and what mixers exempt."""
    exempt = {
        id(parameter)
        for block in lm.blocks
        for name, parameter in block.mixer.named_parameters()
        if name in block.mixer.no_weight_decay
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in lm.parameters():
        groups[parameter.dim() >= 2 and id(parameter) not in exempt].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    ]


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters without the position table, as GPT-2's sizes are quoted."""
    return sum(p.numel() for name, p in _meta_lm(config).named_parameters() if name != "positions.weight")


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Return the floating-point operations of a forward and backward pass per token at `context` tokens.

    A matrix costs 2 operations per weight forward and 4 backward (Kaplan et al. 2020, arXiv 2001.08361), so the
    backward pass costs twice the forward pass. Recomputation and the embedding lookup are not counted.
    """
    forward = 2.0 * config.vocab_size * config.width
    for block in _meta_lm(config).blocks:
        forward += block.mlp.flops_per_token() + block.mixer.flops_per_token(context)
    return 3 * forward


def state_bytes(config: ModelConfig, context: int) -> int:
    """Return the bytes that remembering one sequence of `context` tokens takes, in the dtype of fp32 weights."""
    return sum(block.mixer.state_bytes(context) for block in _meta_lm(config).blocks)


@functools.lru_cache(maxsize=16)
def _meta_lm(config: ModelConfig) -> LM:
    with torch.device("meta"):
        return LM(config)
