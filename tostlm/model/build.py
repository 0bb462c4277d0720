"""Models from their configs: created and initialized, grouped for the optimizer, and counted.

Initialization and groups are the authors' recipe, which is nanoGPT's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

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


class GroupRule(NamedTuple):
    """What the optimizer does otherwise with the parameters in whose names a regular expression is found."""

    match: str
    lr_scale: float  # times the learning rate
    weight_decay: float | None  # of those of them that decay; None is that of all others


KINDS = ("decay", "no_decay", "matrices", "matrices_no_decay")


def parameter_groups(
    lm: LM, weight_decay: float, apart: Collection[str] = (), rules: Sequence[GroupRule] = ()
) -> list[dict[str, Any]]:
    """Return torch's optimizer groups, each of one kind and under one rule, the first that matches, or none.

    A group's `kind` is "decay", or "no_decay" of norms, gains and what mixers exempt; of the parameters named in
    `apart`, "matrices" or "matrices_no_decay". Its learning rate is to be `lr_scale` times the run's.
    """
    exempt = {
        id(parameter)
        for block in lm.blocks
        for name, parameter in block.mixer.named_parameters()
        if name in block.mixer.no_weight_decay
    }
    groups: dict[tuple[int, int], list[nn.Parameter]] = {}
    # `lm` itself may be partitioned: its parameters then have lost their shapes.
    for (name, parameter), whole in zip(lm.named_parameters(), _meta_lm(lm.config).parameters(), strict=True):
        decays = whole.dim() >= 2 and id(parameter) not in exempt
        kind = KINDS[2 * (name in apart) + (not decays)]
        groups.setdefault((matching_rule(name, rules), KINDS.index(kind)), []).append(parameter)
    found = []
    for (place, number), members in sorted(groups.items(), key=lambda item: item[0]):
        kind, rule = KINDS[number], rules[place] if place < len(rules) else None
        decay = weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
        found.append(
            {
                "name": kind if rule is None else f"groups.{place}/{kind}",
                "kind": kind,
                "params": members,
                "weight_decay": 0.0 if kind.endswith("no_decay") else decay,
                "lr_scale": 1.0 if rule is None else rule.lr_scale,
            }
        )
    return found


def matching_rule(name: str, rules: Sequence[GroupRule]) -> int:
    """Return the place of the first rule that fits a parameter's name; the number of rules if none does."""
    return next((place for place, rule in enumerate(rules) if re.search(rule.match, name)), len(rules))


def parameter_names(config: ModelConfig) -> list[str]:
    """Return the names of a model's parameters."""
    return [name for name, _ in _meta_lm(config).named_parameters()]


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's weights by name."""
    return {name: weight.shape for name, weight in _meta_lm(config).named_parameters()}


def hidden_matrices(config: ModelConfig, split_heads: bool = False) -> dict[str, int]:
    """Return the names of the blocks' linear layers' matrices, and of how many equal ones each is made.

    Projections to a number for each head are not among them. With `split_heads` those to the heads' queries, keys,
    values and the like have a matrix for each head.
    """
    return {
        f"{name}.weight": getattr(layer, "parts", 1) * (getattr(layer, "heads", 1) if split_heads else 1)
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
