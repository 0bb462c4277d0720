"""Token mixers beside a C x C linear layer: what a layer of each costs, forward and backward, at growing contexts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tostlm.bench.report import begin, clock, report, take_turns
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.model import MIXERS, Mixer, ModelConfig, create_lm
from tostlm.model.positions import SequencePositions

LINEAR = "linear"


class Cost(NamedTuple):
    """The cost of one layer at one context: the median of interleaved passes."""

    layer: str
    tokens: int
    seconds: float  # CPU seconds on a CPU, else elapsed
    linears: float  # in passes of the linear layer
    weights: float  # parameters, in those of the linear layer
    state_bytes: int


def report_mixers(
    mixers: Sequence[str], width: int, heads: int, lengths: Sequence[int], repeats: int, threads: int, out: Path | None
) -> str:
    """Time a layer of each mixer with its default options, and return the table of their costs.

    Args:
        mixers: their registered names.
        lengths: tokens of the one sequence that a pass reads.
        out: a .json file to write the costs to as well.

    Raises:
        UserError: there is no such mixer.
    """
    for name in mixers:
        if name not in MIXERS:
            raise UserError(f"--mixers {name} is not known; use {', '.join(sorted(MIXERS))}")
    begin(threads, out)
    device = best_device()
    costs = [cost for tokens in lengths for cost in bench_mixers(mixers, width, heads, tokens, repeats, device)]
    return report(table(costs), device, out, width=width, heads=heads, costs=[cost._asdict() for cost in costs])


def bench_mixers(
    mixers: Sequence[str], width: int, heads: int, tokens: int, repeats: int, device: torch.device
) -> list[Cost]:
    """Time forward and backward passes of mixers and of a linear layer, which take turns, after one that warms up."""
    layers = tuple(MIXERS[name].options_class() for name in mixers)
    config = ModelConfig(len(layers), width, heads, vocab_size=1, positions=tokens, layers=layers)
    blocks = create_lm(config, seed=0).to(device).blocks
    linear = nn.Linear(width, width, bias=False, device=device)
    read = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = SequencePositions.build(read, 0, None, None, any(b.mixer.needs_spans for b in blocks))
    x = torch.randn(1, tokens, width, device=device, requires_grad=True)
    timed = dict(zip((LINEAR, *mixers), (linear, *(block.mixer for block in blocks)), strict=True))
    passes = {name: partial(_time_pass, layer, x, positions) for name, layer in timed.items()}
    medians = {name: statistics.median(seconds) for name, seconds in take_turns(passes, repeats).items()}
    costs = [Cost(LINEAR, tokens, medians[LINEAR], 1.0, 1.0, 0)]
    for name, block in zip(mixers, blocks, strict=True):
        weights = sum(p.numel() for n, p in block.mixer.named_parameters() if n != "bias") / width**2
        ratio = medians[name] / medians[LINEAR]
        costs.append(Cost(name, tokens, medians[name], ratio, weights, block.mixer.state_bytes(tokens)))
    return costs


def _time_pass(layer: nn.Module, x: torch.Tensor, positions: SequencePositions) -> float:
    start = clock(x.device)
    y = layer(x, positions, None)[0] if isinstance(layer, Mixer) else layer(x)
    y.backward(torch.ones_like(y))
    elapsed = clock(x.device) - start
    layer.zero_grad()
    x.grad = None
    return elapsed


def table(costs: Sequence[Cost]) -> str:
    """Return a table of the costs, by tokens."""
    lines = [f"{'tokens':>8}  {'layer':<18}{'seconds':>9}{'linears':>9}{'weights':>9}{'state bytes':>13}"]
    for cost in costs:
        numbers = f"{cost.seconds:>9.3f}{cost.linears:>9.2f}{cost.weights:>9.2f}{cost.state_bytes:>13,}"
        lines.append(f"{cost.tokens:>8}  {cost.layer:<18}{numbers}")
    return "\n".join([f"{lines[0]}   a layer, forward and backward", *lines[1:]])
