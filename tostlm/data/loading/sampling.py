"""The order in which a run reads windows: computed from the sample's number, never stored."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

FEISTEL_ROUNDS = 6  # four make a pseudorandom permutation (Luby and Rackoff 1988)
MAX_CYCLE = 1_000_000  # samples; weights are exact to a millionth


def permute(index: int, size: int, key: str) -> int:
    """Return the value at `index` of a pseudorandom permutation of range(size).

    A Feistel network permutes the numbers below a power of four that is at least `size`. It is applied again until the
    value is below `size`, which makes it a permutation of range(size) (cycle walking, Black and Rogaway 2002).

    Args:
        index: a number below `size`.
        size: how many numbers are permuted.
        key: selects the permutation.
    """
    if size == 1:
        return 0
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_ in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


class Blend:
    """Assigns the samples of a run to several token sets by weight.

    The samples are divided into cycles of `length`. Every cycle holds exactly `counts[i]` samples of set i, in a
    pseudorandom order of its own. The length is the common denominator of the weights, which are taken as the decimal
    numbers they are written as, or `MAX_CYCLE` if that is shorter; then the counts are rounded to the total, and the
    count of a very small weight is 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = _normalize(weights)
        self.length = min(math.lcm(*(share.denominator for share in shares)), MAX_CYCLE)
        self.counts = _round_to_total([share * self.length for share in shares])
        self._offsets = [0, *accumulate(self.counts)]

    def locate(self, sample: int, key: str) -> tuple[int, int]:
        """Return the token set of a sample, and how many samples of the same set come before it.

        Args:
            sample: the number of the sample in the run.
            key: selects the order of the sets within the cycles.
        """
        cycle, index = divmod(sample, self.length)
        slot = permute(index, self.length, f"{key}/{cycle}")
        chosen = bisect_right(self._offsets, slot) - 1
        return chosen, cycle * self.counts[chosen] + slot - self._offsets[chosen]


class StreamRows:
    """Assigns the rows of a batch to token sets, for stateful training: each row reads its set window after window.

    `counts[i]` of the `length` rows read set i, by its weight. They start at equal distances from each other and, after
    the last window, continue with the first.
    """

    def __init__(self, weights: Sequence[float], rows: int) -> None:
        self.length = rows
        self.counts = _round_to_total([share * rows for share in _normalize(weights)])
        self._offsets = [0, *accumulate(self.counts)]

    def locate(self, sample: int, windows: Sequence[int]) -> tuple[int, int]:
        """Return the token set of a sample and the number of the window in it.

        Args:
            sample: the number of the sample in the run; consecutive samples are the rows of one batch.
            windows: how many windows each token set has.
        """
        step, row = divmod(sample, self.length)
        chosen = bisect_right(self._offsets, row) - 1
        start = (row - self._offsets[chosen]) * windows[chosen] // self.counts[chosen]
        return chosen, (start + step) % windows[chosen]


def _normalize(weights: Sequence[float]) -> list[Fraction]:
    """Return the weights divided by their sum, exact for the decimal numbers that they are written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _round_to_total(parts: Sequence[Fraction]) -> list[int]:
    """Round parts whose sum is an integer to integers of the same sum, by the largest-remainder method."""
    counts = [math.floor(part) for part in parts]
    missing = int(sum(parts)) - sum(counts)
    for index in sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])[:missing]:
        counts[index] += 1
    return counts
