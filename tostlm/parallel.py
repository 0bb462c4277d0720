"""Heads for tokens: how attention over all tokens is shared by ranks that hold some of them.

Each rank gives every other the heads that are that one's, of its own tokens, and so sees all tokens of its heads
(DeepSpeed-Ulysses, arXiv 2309.14509). Shapes: R ranks, H heads, T tokens of a rank, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.autograd import first_order


def heads_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., H, T, D] of this rank's tokens -> [..., H / R, R T, D] of this rank's heads.

    Raises:
        ValueError: the heads do not split over the ranks.
    """
    heads, ranks = x.shape[-3], group.size()
    if heads % ranks:
        raise ValueError(f"{heads} heads do not split over {ranks} ranks; softmax layers need as many or a divisor")
    parts = x.unflatten(-3, (ranks, -1)).movedim(-4, 0)  # [R, ..., H / R, T, D], one for each rank
    return _exchange(parts, group).movedim(0, -3).flatten(-3, -2)


def sequence_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., H / R, R T, D] of this rank's heads -> [..., H, T, D] of this rank's tokens."""
    parts = x.unflatten(-2, (group.size(), -1)).movedim(-3, 0)  # [R, ..., H / R, T, D], one for each rank
    return _exchange(parts, group).movedim(0, -4).flatten(-4, -3)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """parts [R, ...] for each rank -> [R, ...] from each rank."""
    received: Tensor = _Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, d_received: Tensor) -> tuple[Tensor, None]:
        return _exchange(d_received, ctx.group), None


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [...] of every rank, [R, ...] in the group's order; gradients go back to where each came from."""
    gathered: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_parts: Tensor) -> tuple[Tensor, None]:
        d_parts = d_parts.contiguous()
        dist.all_reduce(d_parts, group=ctx.group)
        return d_parts[dist.get_rank(ctx.group)], None
