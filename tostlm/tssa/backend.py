"""What a backend of the operator is and computes.

Shapes: B sequences, T tokens, C channels = H heads x D, N blocks of tokens, as each backend cuts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Forward(NamedTuple):
    """Results of a forward pass, and what the backward pass needs of it."""

    y: Tensor  # [B, T, C] in w's dtype
    energy: Tensor  # [B, C] float64, the state after the last token
    mass: Tensor  # [B, H]
    weighted: Tensor  # [B, C]
    Pi: Tensor  # [B, T, H] in the compute dtype, memberships
    n: Tensor  # [B, T, H], what temp multiplies
    starts_energy: Tensor  # [B, N, C], the state before each block
    starts_mass: Tensor  # [B, N, H]
    starts_weighted: Tensor  # [B, N, C]


class Grads(NamedTuple):
    """Gradients with respect to the inputs; the bias's is D dn."""

    dw: Tensor  # [B, T, C] in w's dtype
    d_temp: Tensor  # [H] in the compute dtype
    dn: Tensor  # [B, T, H]
    d_rho: Tensor  # [H], meaningless unless it was wanted
    d_energy: Tensor  # [B, C] float64
    d_mass: Tensor  # [B, H]
    d_weighted: Tensor  # [B, C]


@dataclass(frozen=True)
class Backend:
    """One implementation. The compute dtype is fp64 for fp64 inputs and fp32 for narrower ones.

    `forward(w, temp, bias, rho, reset, energy, mass, weighted)` takes the inputs of `tostlm.tssa.tssa`, the state in
    float64. No result may share memory with an input.

    `backward(dy, d_energy, d_mass, d_weighted, w, temp, bias, rho, reset, Pi, n, starts_energy, starts_mass,
    starts_weighted, want_rho)` takes the adjoints of y and of the final state, the inputs, and what the forward pass
    saved.
    """

    name: str
    serves: Callable[[str, torch.dtype, int], bool]  # whether it can: device type, dtype of w, head width D
    saved_states: Callable[[int], int]  # N for T tokens
    starts_dtype: torch.dtype  # of the saved states, for inputs narrower than fp64
    forward: Callable[..., Forward]
    backward: Callable[..., Grads]
