"""Matrix products: right, the same every time, and as fast as on the other ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tostlm.doctor.finding import NAMED, OK, Finding, amount, named, unfit
from tostlm.model import best_device

SHAPES = ((64, 96, 32), (257, 129, 65), (512, 768, 256))  # rows, inner, columns
SIDE = {"cpu": 512, "cuda": 8192}  # of the square matrices that are timed
WINDOWS, WINDOW_SECONDS = 6, 0.25
SLOW = 0.7  # of the median


class Gemm(NamedTuple):
    """A rank's matrix products."""

    dtype: str  # the run's
    worst_error: float  # of a product's element, as a share of what rounding may do
    steady: bool  # the same bits every time
    flops: float  # a second


def measure(dtype: torch.dtype) -> Gemm:
    """Multiply on this rank's device; all ranks do so at once, as ranks of one host share its cores and its power.

    The speed is that of the best of `WINDOWS`, each a fixed time: what the others did meanwhile is the same for all.
    """
    device = best_device()
    generator = torch.Generator().manual_seed(0)
    kinds = {torch.float32, dtype}
    worst = float(np.max([_error(shape, kind, device, generator) for shape in SHAPES for kind in kinds]))
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    first = torch.matmul(a, b)
    flops, steady = 0.0, True
    for _ in range(WINDOWS):
        start, products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < WINDOW_SECONDS:
            again = torch.matmul(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize()
            products += 1
        flops = max(flops, 2 * side**3 * products / seconds)
        steady = steady and torch.equal(first, again)
    return Gemm(str(dtype).removeprefix("torch."), worst, steady, flops)


def _error(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> float:
    """The largest error of a product's elements against numpy's in float64, as a share of its bound.

    The bound is n u |A| |B| for a sum of n products in fp32 (Higham 2002, section 3.5), with some roundings to the
    dtype of the result, as GPUs add up partial sums in it.
    """
    rows, inner, columns = shape
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, inner), (inner, columns)))
    product = _float64(torch.matmul(a.to(device), b.to(device)))
    exact, magnitude = _float64(a) @ _float64(b), np.abs(_float64(a)) @ np.abs(_float64(b))
    bound = (inner * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps) * magnitude
    return float(np.max(np.abs(product - exact) / bound))


def _float64(x: Tensor) -> np.ndarray:
    return x.cpu().double().numpy()


def best(rounds: Sequence[Gemm]) -> Gemm:
    """Several measurements of a rank as one: its best speed and its worst errors."""
    worst = float(np.max([one.worst_error for one in rounds]))
    return Gemm(rounds[0].dtype, worst, all(one.steady for one in rounds), max(one.flops for one in rounds))


def judge(gemms: Sequence[Gemm], hosts: Sequence[str]) -> list[Finding]:
    """Whether all ranks compute, and at one pace: a finding, or one of what is wrong and one of what is slow."""
    wrong = [rank for rank, gemm in enumerate(gemms) if not (gemm.steady and gemm.worst_error <= 1)]
    speeds = [gemm.flops for gemm in gemms]
    median = statistics.median(speeds)
    slow = [rank for rank, speed in enumerate(speeds) if speed < SLOW * median]
    findings = []
    if wrong:
        first = gemms[wrong[0]]
        why = f"matrix products are off by {first.worst_error:.3g} times what rounding can do"
        if first.worst_error <= 1:
            why = "the same matrix product gives other bits from time to time"
        findings.append(unfit("gemm", wrong, hosts, why))
    if slow:
        shares = ", ".join(f"{speeds[rank] / median:.2f}" for rank in slow[:NAMED])
        pace = f"{shares} of the median {amount(median, 'FLOP/s')} {gemms[0].dtype}"
        findings.append(unfit("gemm", slow, hosts, pace))
    slowest, fastest = (amount(speed, "FLOP/s") for speed in (min(speeds), max(speeds)))
    spread = f"{slowest} ({named([speeds.index(min(speeds))], hosts)}) to {fastest}"
    return findings or [Finding("gemm", OK, f"right and steady; {gemms[0].dtype} {spread}")]
