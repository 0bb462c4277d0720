"""What the operator did, in numbers for people."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.tssa.chunked import blocks, decays, scan


class Statistics(NamedTuple):
    """Means over the sequences and tokens of one call, in fp32 or wider."""

    membership: Tensor  # [H], share of the tokens in each head's subspace
    entropy: Tensor  # [], of the memberships, as a share of log H: 1 where every head takes the same
    gate: Tensor  # [H], 1 / (1 + second moment), weighted by energy: what a head's channels are scaled by
    horizon: Tensor  # [H], tokens that the running sums hold in effect, of this call alone


@torch.no_grad()
def statistics(w: Tensor, y: Tensor, Pi: Tensor, rho: Tensor | None, reset: Tensor | None) -> Statistics:
    """Statistics of one call from its input and output [B, T, C] and its memberships [B, T, H]."""
    B, T, H = Pi.shape
    x, out = (tensor.to(Pi.dtype).view(B, T, H, -1) for tensor in (w, y))
    entropy = -torch.special.xlogy(Pi, Pi).sum(-1).mean() / math.log(max(H, 2))
    taken = (x * x).sum(-1) * Pi  # [B, T, H]
    gate = -(x * out).sum((0, 1, 3)) / taken.sum((0, 1)).clamp_min(torch.finfo(Pi.dtype).tiny)
    decay = decays(rho, reset, B, T, H, Pi.dtype)
    held, carry = [], torch.zeros(B, H, 1, dtype=torch.float64, device=w.device)
    for block in blocks(T):
        count = torch.ones(B, block.stop - block.start, H, 1, dtype=Pi.dtype, device=w.device)
        carry = scan(count, None if decay is None else decay[:, block].contiguous(), carry)
        held.append(count.sum((0, 1, 3)))
    return Statistics(Pi.mean((0, 1)), entropy, gate, torch.stack(held).sum(0) / (B * T))
