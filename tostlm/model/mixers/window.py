"""Softmax attention over the last few tokens, with a state of constant size.

Shapes: B sequences, T tokens of this rank, C channels = H heads x D, W tokens of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.neighbours import neighbours
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


@dataclass(frozen=True)
class WindowOptions(AttentionOptions):
    """Options of sliding-window attention: those of softmax attention, rotary by default, and the window."""

    mixer: Literal["window"] = "window"
    window_tokens: int = 128  # tokens that each token reads, itself included
    rotary_base: float | None = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_tokens < 2:
            raise ValueError(f"window_tokens {self.window_tokens} must be 2 or more")


class WindowState(NamedTuple):
    """Keys and values of the last W - 1 tokens, zeros where there were fewer, and what the convolutions reach."""

    last: Tensor  # [B, W - 1, 2C], keys and values
    tail: Tensor  # [B, max(0, short_conv - 1), 3C]


class WindowAttention(Attention):
    """Softmax attention in which a token reads itself and the W - 1 before it, in its document."""

    options_class = WindowOptions
    state_class = WindowState
    constant_state = True
    context_parallel = "sequence"

    def __init__(self, config: ModelConfig, options: WindowOptions) -> None:
        super().__init__(config, options)
        self.window = options.window_tokens

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: WindowState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], WindowState]:
        B, T, C = x.shape
        q, k, v, tail = self.project(x, positions, None if state is None else state.tail, added_values)
        kv = torch.cat([z.transpose(1, 2).reshape(B, T, C) for z in (k, v)], -1)  # [B, T, 2C]
        before, last = neighbours(kv, None if state is None else state.last, self.window - 1, positions)
        kv = torch.cat([before.to(kv.dtype), kv], 1)  # [B, W - 1 + T, 2C]
        return self.finish(self._attend(q, kv, positions), x), WindowState(last, tail)

    def _attend(self, q: Tensor, kv: Tensor, positions: SequencePositions) -> Tensor:
        """Return y [B, H, T, D] of queries [B, H, T, D] and the keys and values from W - 1 tokens before them on.

        Queries are taken in blocks of L, each of which reads L + W - 1 keys: so time and memory are linear in T.
        """
        _, H, T, D = q.shape
        L = min(T, self.window)
        padding = -T % L
        q = F.pad(q, (0, 0, 0, padding)).unflatten(2, (-1, L))  # [B, H, N, L, D]
        kv = F.pad(kv, (0, 0, 0, padding)).unfold(1, L + self.window - 1, L)  # [B, N, 2C, L + W - 1]
        k, v = kv.unflatten(2, (2, H, D)).permute(2, 0, 3, 1, 5, 4)  # each [B, H, N, L + W - 1, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(positions, L, padding))
        return y.flatten(2, 3)[:, :, :T]

    def _mask(self, positions: SequencePositions, L: int, padding: int) -> Tensor:
        """Return which keys the queries of each block may read, [1 or B, 1, N, L, L + W - 1]."""
        device = positions.positions.device
        i, j = torch.arange(L, device=device)[:, None], torch.arange(L + self.window - 1, device=device)
        back = i + self.window - 1 - j  # tokens from the key to the query
        own = torch.atleast_2d(F.pad(positions.positions, (0, padding))).unflatten(1, (-1, L))  # [1 or B, N, L]
        reach = own.clamp_max(self.window - 1)  # tokens of its document in a token's window, itself left out
        mask: Tensor = (back >= 0) & (back <= reach[..., None])
        return mask[:, None]

    def flops_per_token(self, context: int) -> float:
        return self.projection_flops() + 4 * self.config.width * min(self.window, context / 2)

    def state_bytes(self, context: int) -> int:
        return 4 * 2 * self.config.width * (self.window - 1) + self.tail_bytes()
