"""Statistics of a call of the operator, for training logs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.tssa.backend import Inputs
from tostlm.tssa.chunked import blocks, scan


class Statistics(NamedTuple):
    """Means over the sequences and tokens of one call, in fp32 or wider."""

    membership: Tensor  # [H], share of the tokens in each head's subspace
    entropy: Tensor  # [], of the memberships, divided by log H: 1 where they are uniform
    gate: Tensor  # [H], 1 / (1 + second moment), weighted by energy: the factor of a head's channels
    horizon: Tensor  # [H], tokens that the running sums hold in effect, of this call alone


@torch.no_grad()
def compute_statistics(inputs: Inputs, y: Tensor, Pi: Tensor) -> Statistics:
    """Return the statistics of a call from its inputs, its output y [B, T, C] and its memberships Pi [B, T, H]."""
    B, T, H, D = inputs.sizes
    x, out = (tensor.to(Pi.dtype).view(B, T, H, D) for tensor in (inputs.w, y))
    entropy = -torch.special.xlogy(Pi, Pi).sum(-1).mean() / math.log(max(H, 2))
    energy = (x * x).sum(-1) * Pi  # [B, T, H]
    gate = -(x * out).sum((0, 1, 3)) / energy.sum((0, 1)).clamp_min(torch.finfo(Pi.dtype).tiny)
    decays = inputs.decays(Pi.dtype)
    held, carry = [], torch.zeros(B, H, 1, dtype=torch.float64, device=y.device)
    for block in blocks(T):
        count = torch.ones(B, block.stop - block.start, H, 1, dtype=Pi.dtype, device=y.device)
        carry = scan(count, None if decays is None else decays[:, block].contiguous(), carry)
        held.append(count.sum((0, 1, 3)))
    return Statistics(Pi.mean((0, 1)), entropy, gate, torch.stack(held).sum(0) / (B * T))
