"""Softmax attention at Fibonacci distances, of which every head has its own.

Shapes: B sequences, T tokens of this rank, C channels = H heads x D, K distances of a head, F the largest of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.near_attention import with_neighbours
from tostlm.model.parts.recompute import recomputed
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


@dataclass(frozen=True)
class FibottentionOptions(AttentionOptions):
    """Options of Fibottention: those of softmax attention, rotary by default, and the distances."""

    mixer: Literal["fibottention"] = "fibottention"
    # The largest distance that the first head may read at, and the last head; evenly between.
    distance_tokens: tuple[int, int] = (5, 256)
    # Rows of Wythoff's array, which have no distance in common; or each with the two terms that come before it.
    sequences: Literal["wythoff", "modified"] = "wythoff"
    rotary_base: float | None = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.distance_tokens[0] <= self.distance_tokens[1]:
            raise ValueError(f"distance_tokens {list(self.distance_tokens)} must be 1 or more, shortest first")


class FibottentionState(NamedTuple):
    """Keys and values of the last F tokens, zeros where there were fewer, and what the convolutions reach."""

    last: Tensor  # [B, F, 2C], keys and values
    tail: Tensor  # [B, max(0, short_conv - 1), 3C]


class Fibottention(Attention):
    """Softmax attention in which head h reads the token itself and those at the distances of its Fibonacci sequence.

    A head's keys and values are stacked by distance, 2 T K D numbers, one head at a time, and stacked again in the
    backward pass.

    Source: Fibottention (arXiv 2406.19391), causal. The token itself is added in every head: a document's first token
    would read nothing.
    """

    options_class = FibottentionOptions
    state_class = FibottentionState
    constant_state = True
    context_parallel = "sequence"

    def __init__(self, config: ModelConfig, options: FibottentionOptions) -> None:
        """Raises: ValueError: the distances leave a head nothing but the token itself."""
        super().__init__(config, options)
        self.distances = head_distances(config.heads, options)
        self.largest = max(own[-1] for own in self.distances)
        for head, own in enumerate(self.distances):
            if own == [0]:
                raise ValueError(
                    f"distance_tokens {list(options.distance_tokens)} leave head {head + 1} of {config.heads} nothing "
                    "but the token itself; make them larger"
                )

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: FibottentionState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], FibottentionState]:
        last, tail = (None, None) if state is None else state
        q, k, v, tail = self.project(x, positions, tail, added_values)
        kv, last = with_neighbours((k, v), last, self.largest, positions)
        k, v = kv.unflatten(2, (2, *q.shape[1::2])).unbind(2)  # each [B, F + T, H, D]
        own = torch.atleast_2d(positions.positions)
        heads = [
            recomputed(self._read, q[:, h], k[:, :, h], v[:, :, h], own, distances)
            for h, distances in enumerate(self.distances)
        ]
        return self.finish(torch.stack(heads, 1), x), FibottentionState(last, tail)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, distances: list[int]) -> Tensor:
        """Return what a head reads [B, T, D], of queries [B, T, D] and keys and values [B, F + T, D]."""
        T = q.shape[1]
        firsts = [self.largest - distance for distance in distances]
        k, v = (torch.stack([x[:, first : first + T] for first in firsts], 2) for x in (k, v))  # [B, T, K, D]
        mask = torch.stack([positions >= distance for distance in distances], -1)  # [1 or B, T, K]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, :, None])[:, :, 0]

    def flops_per_token(self, context: int) -> float:
        # The tokens at a document's start have nothing at the longer distances.
        read = sum(max(0, context - distance) / context for own in self.distances for distance in own)
        return self.projection_flops() + 4 * self.config.width / self.config.heads * read

    def state_bytes(self, context: int) -> int:
        return 4 * 2 * self.config.width * self.largest + self.tail_bytes()


def head_distances(heads: int, options: FibottentionOptions) -> list[list[int]]:
    """Return the distances that each head reads at, 0 among them, shortest first.

    Head i = 1 .. H has row i of Wythoff's array, a = floor(n phi), b = floor(n phi^2) with n = floor(i phi), then each
    term the sum of the two before; up to w_i = w_1 + floor((w_H - w_1) (i - 1) / (H - 1)).
    """
    shortest, longest = options.distance_tokens
    found = []
    for i in range(1, heads + 1):
        limit = longest if heads == 1 else shortest + (longest - shortest) * (i - 1) // (heads - 1)
        n = _times_golden_ratio(i)
        a = _times_golden_ratio(n)
        b = a + n
        if options.sequences == "modified":
            a, b = 2 * a - b, b - a
        own = {0}
        while a <= limit:
            own.add(a)
            a, b = b, a + b
        found.append(sorted(own))
    return found


def _times_golden_ratio(n: int) -> int:
    return (n + isqrt(5 * n * n)) // 2
