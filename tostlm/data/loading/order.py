"""The order in which a run reads samples: computed, never stored."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

ROUNDS = 6  # of the Feistel network; four give a pseudorandom permutation (Luby and Rackoff 1988)
LONGEST_CYCLE = 1_000_000  # samples; weights are kept to a millionth


def permuted(index: int, size: int, key: str) -> int:
    """Where a pseudorandom permutation of range(size), chosen by `key`, puts `index`.

    A Feistel network permutes the power of four at or above `size`; walking on from a value outside the range until
    one is inside it (cycle walking, Black and Rogaway 2002) leaves a permutation of the range.
    """
    if size == 1:
        return 0
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_ in range(ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


class StreamRows:
    """Rows of a step that read on: each of the `length` rows walks through one set, window by window, for ever.

    Set i has `counts[i]` of the rows, by the largest remainder of its weight; they start at equal distances from each
    other, so that together they have read the set once when each has come to where the next one began.
    """

    def __init__(self, weights: Sequence[float], rows: int) -> None:
        self.length = rows
        self.counts = _rounded([share * rows for share in _shares(weights)])
        self._firsts = [0, *accumulate(self.counts)]

    def pick(self, sample: int, windows: Sequence[int]) -> tuple[int, int]:
        """The set that sample number `sample` is of, and which of the set's windows it is; sets hold `windows[i]`."""
        step, row = divmod(sample, self.length)
        chosen = bisect_right(self._firsts, row) - 1
        start = (row - self._firsts[chosen]) * windows[chosen] // self.counts[chosen]
        return chosen, (start + step) % windows[chosen]


class Blend:
    """Whose the samples of a run are: in every cycle of `length` samples set i has exactly `counts[i]`.

    The cycle is the common denominator of the weights, each taken as the decimal number it is written as; where that
    is beyond `LONGEST_CYCLE`, the weights are rounded to that many parts by the largest remainder. A count may be 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = _shares(weights)
        self.length = min(math.lcm(*(share.denominator for share in shares)), LONGEST_CYCLE)
        self.counts = _rounded([share * self.length for share in shares])
        self._firsts = [0, *accumulate(self.counts)]

    def pick(self, sample: int, key: str) -> tuple[int, int]:
        """The set that sample number `sample` is of, and which of that set's samples it is."""
        cycle, place = divmod(sample, self.length)
        slot = permuted(place, self.length, f"{key}/{cycle}")
        chosen = bisect_right(self._firsts, slot) - 1
        return chosen, cycle * self.counts[chosen] + slot - self._firsts[chosen]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """Of one, each weight taken as the decimal number it is written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _rounded(parts: Sequence[Fraction]) -> list[int]:
    """Whole numbers of the same sum, which is whole: the largest remainders are rounded up."""
    counts = [math.floor(part) for part in parts]
    missing = int(sum(parts)) - sum(counts)
    for index in sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])[:missing]:
        counts[index] += 1
    return counts
