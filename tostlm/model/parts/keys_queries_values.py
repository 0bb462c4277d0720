"""What a head with a matrix of memory reads and writes at each token.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.model.parts.forgetting import Forgetting, ForgettingOptions, Kind
from tostlm.model.parts.projections import FusedLinear, project_tokens, project_values
from tostlm.model.parts.short_conv import ShortConv, check_taps, tail_bytes
from tostlm.model.positions import SequencePositions

EPS = 1e-6  # of the length of a key


@dataclass(frozen=True)
class MatrixMixerOptions(ForgettingOptions):
    """What mixers with a matrix of memory in each head have in common."""

    forgetting: Kind = "selective"
    short_conv: int = 4  # taps of the convolutions of keys, queries and values, SiLU after them; 0 for neither
    gate: Literal["none", "output"] = "output"  # the output times sigmoid(G x)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taps(self.short_conv)


class ReadsAndWrites(NamedTuple):
    """In fp32, or float64 where x is."""

    keys: Tensor  # [B, T, H, D], each of length 1
    raw_keys: Tensor  # [B, T, H, D], the keys before that
    queries: Tensor  # [B, T, H, D]
    values: Tensor  # [B, T, H, D]
    strengths: Tensor  # [B, T, H] in (0, 1), of the writing; 1 where a mixer has its own instead
    log_decays: Tensor  # [B, T, H] or [1, 1, H], of what the head remembers


class KeysQueriesValues(nn.Module):
    """k, q, v = silu(conv(W x)), k of length 1; how strongly to write, sigmoid(W_b x + c); and how much to keep."""

    def __init__(self, config: ModelConfig, options: MatrixMixerOptions, own_strengths: bool) -> None:
        """Build it, uninitialized; `own_strengths` is whether the mixer takes strengths from elsewhere."""
        super().__init__()
        C, H = config.width, config.heads
        self.config = config
        self.in_proj = FusedLinear(C, C, parts=3, heads=H)
        self.conv = ShortConv(3 * C, options.short_conv, silu=True) if options.short_conv else None
        self.forgetting = Forgetting(options, C, H)
        self.write_proj = None if own_strengths else nn.Linear(C, H)

    def values(self, x: Tensor) -> Tensor:
        """Return the values [B, T, C] of tokens x before the convolution."""
        return project_values(self.in_proj, x)

    def forward(
        self, x: Tensor, tail: Tensor | None, positions: SequencePositions, added_values: Tensor | None
    ) -> tuple[ReadsAndWrites, Tensor]:
        """Return them for tokens x [B, T, C], and the tail of the convolution, as `ShortConv` has it.

        `added_values` [B, T, C] are added to the values before the convolution.
        """
        B, T, C = x.shape
        H, wide = self.config.heads, torch.promote_types(x.dtype, torch.float32)
        kqv, tail = project_tokens(self.in_proj, self.conv, x, tail, positions, added_values)
        w, q, v = kqv.to(wide).view(B, T, 3, H, C // H).unbind(2)
        k = F.normalize(w, dim=-1, eps=EPS)
        strengths = w.new_ones(B, T, H) if self.write_proj is None else self.write_proj(x).to(wide).sigmoid()
        return ReadsAndWrites(k, w, q, v, strengths, self.forgetting(x)), tail

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        std = self.config.init_std
        self.in_proj.weight.normal_(0, std, generator=generator)
        if self.write_proj is not None:
            self.write_proj.weight.normal_(0, std, generator=generator)
            self.write_proj.bias.zero_()
        self.forgetting.reset_parameters(std, generator)
        if self.conv is not None:
            self.conv.reset_parameters(generator)

    def flops_per_token(self) -> float:
        """Return the floating-point operations of the forward pass per token."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    def tail_bytes(self) -> int:
        """Return the bytes of one sequence's tail."""
        return tail_bytes(self.conv)
