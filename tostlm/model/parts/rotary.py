"""Rotary positions: pairs of channels turned by angles that grow with the token's position.

Source: RoFormer (arXiv 2104.09864), the halves of a head as pairs, as GPT-NeoX has them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Return x [..., B, H, T, D] turned by its tokens' positions [T] or [B, T]; D is even.

    Channel i of the first half and of the second turn by position base^(-2i / D). Angles are taken in float64, as
    those of far positions in fp32 would be off by whole degrees.
    """
    D = x.shape[-1]
    frequencies = base ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angles = positions[..., None] * frequencies  # [T, D / 2] or [B, T, D / 2]
    if angles.dim() == 3:
        angles = angles[:, None]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
