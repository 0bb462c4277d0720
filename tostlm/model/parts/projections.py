"""Three projections of C channels side by side, of which the last are values, and what is added to those.

Shapes: B sequences, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.parts.short_conv import ShortConv, convolved
from tostlm.model.positions import SequencePositions


class FusedLinear(nn.Linear):
    """Linear layers of the same input in one: their matrices one below the other.

    There are `parts` of them, of `outputs` channels each, which in turn are divided among `heads`.
    """

    def __init__(self, inputs: int, outputs: int, parts: int = 1, heads: int = 1, bias: bool = False) -> None:
        super().__init__(inputs, parts * outputs, bias=bias)
        self.parts, self.heads = parts, heads


def reset_linear(linear: nn.Linear, std: float, generator: torch.Generator) -> None:
    """Initialize a linear layer in place: its matrix normally distributed, its bias, if it has one, zero."""
    linear.weight.normal_(0, std, generator=generator)
    if linear.bias is not None:
        linear.bias.zero_()


def project_tokens(
    in_proj: nn.Linear,
    conv: ShortConv | None,
    x: Tensor,
    tail: Tensor | None,
    positions: SequencePositions,
    added_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the projections of tokens x [B, T, C] after their convolution, [B, T, 3C], and its tail.

    `added_values` [B, T, C] are added to the values before the convolution.
    """
    y = in_proj(x)
    if added_values is not None:
        y = y + F.pad(added_values, (2 * x.shape[-1], 0))
    return convolved(conv, y, tail, positions)


def project_values(in_proj: nn.Linear, x: Tensor) -> Tensor:
    """Return the values [B, T, C] alone, before their convolution."""
    values: Tensor = in_proj(x)[..., 2 * x.shape[-1] :]
    return values
