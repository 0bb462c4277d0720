"""Softmax attention to the last tokens before each one, how many of them its place in its document says.

Shapes: B sequences, T tokens of this rank, C channels = H heads x D, W tokens that a token reads at most.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.mixers.base import MixerState
from tostlm.model.parts.attention import Attention
from tostlm.model.parts.neighbours import neighbours
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


class NearAttention(Attention):
    """A base of mixers in which a token reads itself and at most W - 1 tokens before it, in its document.

    A state has two fields: keys and values of the last W - 1 tokens [B, W - 1, 2C], zeros where there were fewer, and
    the tail of the convolutions as `Attention` has it.

    Attributes:
        span: W.
    """

    constant_state = True
    context_parallel = "sequence"
    span: int

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: MixerState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], MixerState]:
        last, tail = (None, None) if state is None else state
        q, k, v, tail = self.project(x, positions, tail, added_values)
        kv, last = with_neighbours((k, v), last, self.span - 1, positions)
        y = attend_near(q, kv, self.reach(positions.positions), self.span)
        return self.finish(y, x), self.state_class(last, tail)

    @abstractmethod
    def reach(self, positions: Tensor) -> Tensor:
        """Return how many tokens before it, at most W - 1, a token at each of `positions` of its document reads."""

    def state_bytes(self, context: int) -> int:
        return 4 * 2 * self.config.width * (self.span - 1) + self.tail_bytes()


class Further(NamedTuple):
    """What tokens read beside those near them."""

    keys: Tensor  # [B, H, R, D]
    values: Tensor  # [B, H, R, D]
    mask: Tensor  # [1 or B, T, R], which of them each token may read


def with_neighbours(
    parts: tuple[Tensor, ...], last: Tensor | None, kept: int, positions: SequencePositions
) -> tuple[Tensor, Tensor]:
    """Return n parts [B, H, T, D] of the tokens, from `kept` tokens before them on, as [B, kept + T, n C].

    And those of the last `kept` tokens of all ranks [B, kept, n C], as `neighbours` returns them and takes `last`.
    """
    own = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)
    before, last = neighbours(own, last, kept, positions)
    return torch.cat([before.to(own.dtype), own], 1), last


def attend_near(q: Tensor, kv: Tensor, reach: Tensor, span: int, further: Further | None = None) -> Tensor:
    """Return what queries read [B, H, T, D]: of the tokens near them and, in the same softmax, of `further`.

    Queries are taken in blocks of L, each of which reads L + W - 1 keys: so time and memory are linear in T.

    Args:
        q: [B, H, T, D].
        kv: [B, W - 1 + T, 2C], keys and values from W - 1 tokens before the queries on.
        reach: [T] or [B, T], how many tokens before it each token reads, at most W - 1.
        span: W.
    """
    _, H, T, D = q.shape
    L = min(T, span)
    padding = -T % L
    q = F.pad(q, (0, 0, 0, padding)).unflatten(2, (-1, L))  # [B, H, N, L, D]
    kv = F.pad(kv, (0, 0, 0, padding)).unfold(1, L + span - 1, L)  # [B, N, 2C, L + W - 1]
    k, v = kv.unflatten(2, (2, H, D)).permute(2, 0, 3, 1, 5, 4)  # each [B, H, N, L + W - 1, D]
    mask = _near_mask(torch.atleast_2d(F.pad(reach, (0, padding))).unflatten(1, (-1, L)), span)
    if further is not None:
        k, v = (
            torch.cat([near, far[:, :, None].to(near.dtype).expand(-1, -1, q.shape[2], -1, -1)], 3)
            for near, far in ((k, further.keys), (v, further.values))
        )
        # What pads the last block reads as the last query does: torch's compiler for CPUs fails to pad masks.
        rows = torch.arange(T + padding, device=q.device).clamp_max(T - 1)
        readable = further.mask[:, rows].unflatten(1, (-1, L))  # [1 or B, N, L, R]
        mask = torch.cat([mask, readable], -1)
    if torch.compiler.is_exporting():  # ONNX has no attention of five dimensions
        scores = (q @ k.mT * D**-0.5).masked_fill(~mask[:, None], -torch.inf)
        y: Tensor = scores.softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return y.flatten(2, 3)[:, :, :T]


def _near_mask(reach: Tensor, span: int) -> Tensor:
    """Return which keys the queries of each block may read [1 or B, N, L, L + W - 1], of their reach [1 or B, N, L]."""
    L, device = reach.shape[-1], reach.device
    i, j = torch.arange(L, device=device)[:, None], torch.arange(L + span - 1, device=device)
    back = i + span - 1 - j  # tokens from the key to the query
    return (back >= 0) & (back <= reach[..., None])
