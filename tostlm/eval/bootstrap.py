"""Confidence intervals over documents, whose tokens are not independent of each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
AT_ONCE = 1 << 22  # draws that are held at a time
LEVEL = 0.95


class Interval(NamedTuple):
    """A ratio of sums over documents, and the bounds of its confidence interval of 95%; None of a single document."""

    value: float
    low: float | None
    high: float | None


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> Interval:
    """Return sum(numerators) / sum(denominators), and its interval as if the documents were drawn anew.

    Args:
        numerators: float64 [documents], such as nats.
        denominators: float64 [documents], such as tokens; documents of 0 are left out.

    Source: the bootstrap's percentiles (Efron 1979), from one seed.
    """
    kept = denominators > 0
    numerators, denominators = numerators[kept], denominators[kept]
    value, count = float(numerators.sum() / denominators.sum()), len(numerators)
    if count < 2:
        return Interval(value, None, None)
    generator, shares, ratios = np.random.default_rng(0), np.full(count, 1 / count), []
    size = max(1, AT_ONCE // count)
    for done in range(0, RESAMPLES, size):
        times = generator.multinomial(count, shares, min(size, RESAMPLES - done))  # [resamples, documents]
        ratios.append((times @ numerators) / (times @ denominators))
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
