"""The loss and its gradients beside the three matrix products that they take, and beside torch's cross-entropy.

Shapes: N tokens, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.bench.report import begin, clock, report, take_turns
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.model.loss import mean_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = "products"


class LossCost(NamedTuple):
    """What one way to the loss and its gradients costs: the median of interleaved passes."""

    way: str
    dtype: str
    tokens: int
    seconds: float  # CPU seconds on a CPU, else elapsed
    products: float  # in those of the three products


def report_loss(
    width: int,
    vocab_size: int,
    lengths: Sequence[int],
    dtypes: Sequence[str],
    repeats: int,
    threads: int,
    out: Path | None,
) -> str:
    """Time the loss of normalized tokens by a vocabulary's fp32 weight, forward and backward, and return the table.

    Args:
        lengths: tokens of a pass.
        dtypes: of "fp32" and "bf16", which is autocast's.
        out: a .json file to write the costs to as well.

    Raises:
        UserError: a dtype is unknown, or `out` cannot be written.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise UserError(f"--dtypes {name} is not known; use {', '.join(DTYPES)}")
    begin(threads, out)
    device = best_device()
    costs = [
        cost
        for name in dtypes
        for tokens in lengths
        for cost in bench_loss(width, vocab_size, tokens, name, repeats, device)
    ]
    shape = {"width": width, "vocab_size": vocab_size}
    return report(table(costs), device, out, **shape, costs=[cost._asdict() for cost in costs])


def bench_loss(
    width: int, vocab_size: int, tokens: int, dtype: str, repeats: int, device: torch.device
) -> list[LossCost]:
    """Time the ways, which take turns, after one pass that warms up."""
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocab_size, width, device=device)).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device=device)
    low = [tensor.detach().to(DTYPES[dtype]) for tensor in (x, weight)]
    ways: dict[str, Callable[[], object]] = {
        PRODUCTS: lambda: _products(*low),
        "tostlm": lambda: mean_cross_entropy(x, weight, targets).backward(),
        "torch": lambda: F.cross_entropy(F.linear(x, weight).float(), targets).backward(),
    }

    def time_pass(run: Callable[[], object]) -> float:
        x.grad = weight.grad = None
        start = clock(device)
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            run()
        return clock(device) - start

    timed = take_turns({way: partial(time_pass, run) for way, run in ways.items()}, repeats)
    medians = {way: statistics.median(seconds) for way, seconds in timed.items()}
    return [LossCost(way, dtype, tokens, cost, cost / medians[PRODUCTS]) for way, cost in medians.items()]


def _products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = x @ weight.t()  # [N, V]
    return logits @ weight, logits.t() @ x


def table(costs: Sequence[LossCost]) -> str:
    """Return a table of the costs."""
    lines = [f"{'dtype':<6}{'tokens':>8}  {'way':<10}{'seconds':>9}{'products':>10}   forward and backward"]
    for cost in costs:
        lines.append(f"{cost.dtype:<6}{cost.tokens:>8}  {cost.way:<10}{cost.seconds:>9.3f}{cost.products:>10.2f}")
    return "\n".join(lines)
