"""What a model costs: parameters, and floating-point operations a token."""

from __future__ import annotations

import torch

from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM

TSSA_OPERATIONS = 12  # a channel and token, forward: the elementwise steps of the operator


def count_parameters(config: ModelConfig) -> int:
    """Parameters without the position table, as GPT-2 sizes are quoted."""
    with torch.device("meta"):
        lm = LM(config)
    return sum(p.numel() for name, p in lm.named_parameters() if name != "positions.weight")


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward and backward operations a token at `context` tokens.

    Each matrix costs 2 operations a weight forward and 4 backward (Kaplan et al. 2020, arXiv 2001.08361); causal
    attention 4 C for each token it can see (scores and values), on average half the context; TSSA a constant.
    Recomputation and the embedding lookup are not counted.
    """
    C = config.width
    forward = 2.0 * config.vocab_size * C
    for layer in range(config.layers):
        softmax = config.mixer(layer) == "softmax"
        forward += 2 * 8 * C * C  # MLP
        forward += 2 * (4 if softmax else 2) * C * C  # projections
        forward += 4 * C * context / 2 if softmax else TSSA_OPERATIONS * C
    return 3 * forward
