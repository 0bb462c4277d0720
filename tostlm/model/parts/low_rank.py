"""Projections through a narrow middle, which gates and decays of many channels are made by.

Shapes: B sequences, T tokens, C channels, R channels in the middle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """up(inside(down(x))) + offset, in fp32 or wider with an offset."""

    def __init__(self, width: int, rank: int, inside: Callable[[Tensor], Tensor] | None, offset: bool) -> None:
        """Of C = `width` and R = `rank`; `inside` is what is between the matrices, None for nothing."""
        super().__init__()
        self.inside = inside
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.offset = nn.Parameter(torch.empty(width)) if offset else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = self.down(x)
        if self.inside is not None:
            x = self.inside(x)
        y: Tensor = self.up(x)
        if self.offset is None:
            return y
        # Rounded to bf16 with the offset, the part that depends on the token would be lost first.
        wide = torch.promote_types(y.dtype, torch.float32)
        return y.to(wide) + self.offset.to(wide)
