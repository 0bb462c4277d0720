"""Models from their configs: created and initialized, grouped for the optimizer, and counted.

Initialization and groups are the authors' recipe, which is nanoGPT's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM


def create_lm(config: ModelConfig, seed: int, partition: Callable[[nn.Module], None] | None = None) -> LM:
    """Build a model on the CPU and initialize its weights: the same on every machine for one seed.

    `partition` gets each of `LM.parts` when it is initialized, before the next one takes memory, and may leave this
    process a share of it.
    """
    with torch.device("meta"):
        lm = LM(config)
    generator = torch.Generator().manual_seed(seed)
    for part in lm.parts():
        part.to_empty(device="cpu")
        lm.reset_part(part, generator)
        if partition is not None:
            partition(part)
    return lm


def parameter_groups(lm: LM, weight_decay: float, apart: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return torch's optimizer groups: "decay", and "no_decay" of norms, gains and what mixers exempt.

    The parameters named in `apart` are in a third one, "matrices", which decays too.
    """
    exempt = {
        id(parameter)
        for block in lm.blocks
        for name, parameter in block.mixer.named_parameters()
        if name in block.mixer.no_weight_decay
    }
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "matrices": []}
    # `lm` itself may be partitioned: its parameters then have lost their shapes.
    for (name, parameter), whole in zip(lm.named_parameters(), _meta_lm(lm.config).parameters(), strict=True):
        decays = whole.dim() >= 2 and id(parameter) not in exempt
        groups["matrices" if name in apart else "decay" if decays else "no_decay"].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": 0.0 if name == "no_decay" else weight_decay}
        for name, parameters in groups.items()
        if parameters or name != "matrices"
    ]


def hidden_matrices(config: ModelConfig) -> dict[str, int]:
    """Return the names of the blocks' linear layers' matrices, and of how many equal ones each is made.

    Projections to a number for each head are not among them.
    """
    return {
        f"{name}.weight": getattr(layer, "parts", 1)
        for name, layer in _meta_lm(config).named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks.") and min(layer.weight.shape) > config.heads
    }


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters without the position table, as GPT-2's sizes are quoted."""
    return sum(p.numel() for name, p in _meta_lm(config).named_parameters() if name != "positions.weight")


def count_body_parameters(config: ModelConfig) -> int:
    """Return the number of parameters beside embedding, position table and output projection."""
    outside = ("embed.weight", "positions.weight", "head.weight")
    return sum(p.numel() for name, p in _meta_lm(config).named_parameters() if name not in outside)


def largest_part_numel(config: ModelConfig) -> int:
    """Return the number of parameters of the largest of `LM.parts`: the most that one step of the model needs whole."""
    return max(sum(p.numel() for p in part.parameters()) for part in _meta_lm(config).parts())


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
