"""Causal TSSA as the paper states it, token by token in float64: the reference that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from tostlm.tssa.backend import Inputs
from tostlm.tssa.state import State

EPS = 1e-12  # floor of the energy a token is divided by
EPS_MASS = 1e-8  # added to the mass, so that a head without members divides by something


def tssa_reference(inputs: Inputs, state: State | None = None) -> tuple[Tensor, State]:
    """Return y [B, T, C] in float64 and the final state, as `tostlm.tssa.tssa` does; autograd differentiates it.

    Source: Token Statistics Transformer, arXiv 2412.17810, section 3 and the authors' `CausalSelfAttention_TSSA`.
    """
    w, bias = inputs.w, inputs.bias
    B, T, H, D = inputs.sizes
    x = w.double().view(B, T, H, D)
    decays = inputs.decays(torch.float64)
    energy, mass, weighted = State.zeros(B, H * D, H, w.device) if state is None else state
    energy, weighted = energy.view(B, H, D), weighted.view(B, H, D)

    ys = []
    for t in range(T):
        decay = torch.ones_like(mass) if decays is None else decays[:, t]  # [B, H]
        square = x[:, t] ** 2  # [B, H, D]
        energy = decay[..., None] * energy + square
        n = (square / energy.clamp_min(EPS)).sum(-1)  # [B, H]
        if bias is not None:
            n = n + D * bias[..., t, :].double()
        Pi = torch.softmax(inputs.temp.double() * n, dim=-1)
        weighted = decay[..., None] * weighted + Pi[..., None] * square
        mass = decay * mass + Pi
        gate = 1 / (1 + weighted / (mass + EPS_MASS)[..., None])
        ys.append(-x[:, t] * Pi[..., None] * gate)

    y = torch.stack(ys, dim=1) if ys else x
    return y.reshape(w.shape), State(energy.reshape(B, H * D), mass, weighted.reshape(B, H * D))
