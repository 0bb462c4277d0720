"""Batches of windows, a pure function of (seed, step, rank, world size).

A split is cut into windows of `context` tokens. Window numbers are visited in a seeded pseudorandom order, another
one each epoch, computed and never stored: seeking to a step costs nothing, and the windows of a step do not depend on
how many ranks share them.
"""

from __future__ import annotations

import hashlib

import numpy as np

from tostlm.data.shards import TokenSet
from tostlm.errors import UserError

ROUNDS = 6  # of the Feistel network; four give a pseudorandom permutation (Luby and Rackoff 1988)


class Loader:
    """Windows of `context` tokens of a token set, `sequences` of them a step over all ranks.

    Raises:
        UserError: the set is shorter than one window.
    """

    def __init__(self, tokens: TokenSet, context: int, sequences: int, seed: int) -> None:
        self._tokens, self._context, self._sequences, self._seed = tokens, context, sequences, seed
        self.windows = (len(tokens) - 1) // context  # each needs one token more, the last target
        if self.windows < 1:
            raise UserError(
                f"{tokens.folder} holds {len(tokens)} tokens, fewer than one window of {context}; "
                "prepare more text or lower data.context_tokens"
            )

    def batch(self, step: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one rank at one step, int64 [sequences / world, context] each."""
        share = self._sequences // world
        first = step * self._sequences + rank * share
        windows = [self._window(sample) for sample in range(first, first + share)]
        rows = np.stack([self._tokens.tokens(n * self._context, (n + 1) * self._context + 1) for n in windows])
        return rows[:, :-1], rows[:, 1:]

    def _window(self, sample: int) -> int:
        epoch, index = divmod(sample, self.windows)
        return permuted(index, self.windows, f"{self._seed}/{epoch}")


def permuted(index: int, size: int, key: str) -> int:
    """Where a pseudorandom permutation of range(size), chosen by `key`, puts `index`.

    A Feistel network permutes the power of four at or above `size`; walking on from a value outside the range until
    one is inside it (cycle walking, Black and Rogaway 2002) leaves a permutation of the range.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_ in range(ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half_bits) | right
        if index < size:
            return index
