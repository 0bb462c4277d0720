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
    `key` selects the permutation.
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

    The samples are divided into cycles of `length`, and `counts[i]` samples of every cycle are of set i. Without a
    given length it is the common denominator of the weights, which are taken as the decimal numbers they are written
    as, or `MAX_CYCLE` if that is shorter. Counts are rounded to the total; that of a very small weight is 0.
    """

    def __init__(self, weights: Sequence[float], length: int | None = None) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        self.length = length or min(math.lcm(*(share.denominator for share in shares)), MAX_CYCLE)
        self.counts = _round_to_total([share * self.length for share in shares])
        self._offsets = [0, *accumulate(self.counts)]

    def locate(self, sample: int, key: str) -> tuple[int, int]:
        """Return the token set of a sample, and how many samples of the same set come before it.

        The order of the sets is pseudorandom, in each cycle another; `key` selects it.
        """
        cycle, index = divmod(sample, self.length)
        slot = permute(index, self.length, f"{key}/{cycle}")
        chosen = bisect_right(self._offsets, slot) - 1
        return chosen, cycle * self.counts[chosen] + slot - self._offsets[chosen]

    def locate_in_rows(self, sample: int, windows: Sequence[int]) -> tuple[int, int]:
        """Return the token set of a sample and the number of the window in it, for stateful training.

        A cycle is a batch, and each of its rows reads its set window after window: the rows of a set start at equal
        distances from each other and, after the last of its `windows[i]` windows, continue with the first.
        """
        step, row = divmod(sample, self.length)
        chosen = bisect_right(self._offsets, row) - 1
        start = (row - self._offsets[chosen]) * windows[chosen] // self.counts[chosen]
        return chosen, (start + step) % windows[chosen]


def _round_to_total(parts: Sequence[Fraction]) -> list[int]:
    """Round parts whose sum is an integer to integers of the same sum, by the largest-remainder method."""
    counts = [math.floor(part) for part in parts]
    missing = int(sum(parts)) - sum(counts)
    for index in sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])[:missing]:
        counts[index] += 1
    return counts
