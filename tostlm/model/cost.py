"""What a model costs: parameters, floating-point operations and bytes of state, as its layers' mixers say."""

from __future__ import annotations

import functools

import torch

from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM


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
