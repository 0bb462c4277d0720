"""Causal TSSA as the paper states it, one token after another, in float64: what every other form is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from tostlm.tssa.state import State

EPS = 1e-12  # floor of the energy a token is divided by
EPS_MASS = 1e-8  # added to the mass, so that a head without members divides by something


def tssa_reference(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None = None,
    rho: Tensor | None = None,
    reset: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Sequential float64 TSSA through autograd; arguments and results as `tostlm.tssa.tssa`.

    Source: Token Statistics Transformer, arXiv 2412.17810, section 3 and the authors' `CausalSelfAttention_TSSA`.
    """
    B, T, C = w.shape
    H = temp.shape[0]
    D = C // H
    x = w.double().view(B, T, H, D)
    energy, mass, weighted = State.zeros(B, C, H, w.device) if state is None else state
    energy, weighted = energy.view(B, H, D), weighted.view(B, H, D)

    ys = []
    for t in range(T):
        decay = torch.ones(B, H, dtype=torch.float64, device=w.device) if rho is None else rho.double().expand(B, H)
        if reset is not None:
            decay = decay.masked_fill(reset[:, t, None], 0.0)
        square = x[:, t] ** 2  # [B, H, D]
        energy = decay[..., None] * energy + square
        n = (square / energy.clamp_min(EPS)).sum(-1)  # [B, H]
        if bias is not None:
            n = n + D * (bias[t] if bias.dim() == 2 else bias[:, t]).double()
        Pi = torch.softmax(temp.double() * n, dim=-1)
        weighted = decay[..., None] * weighted + Pi[..., None] * square
        mass = decay * mass + Pi
        attn = 1 / (1 + weighted / (mass + EPS_MASS)[..., None])
        ys.append(-x[:, t] * Pi[..., None] * attn)

    y = torch.stack(ys, dim=1).reshape(B, T, C) if ys else x.reshape(B, 0, C)
    return y, State(energy.reshape(B, C), mass, weighted.reshape(B, C))
