"""The operator as torch sees it: a custom op with a fake kernel and a backward, over whichever backend serves.

torch.compile, opcheck and activation checkpointing see one opaque call each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tostlm.tssa.backend import Grads
from tostlm.tssa.dispatch import choose

# Its own names for every copy of this module: an exported model brings one, and two of them may be loaded at once.
_NAMESPACE = __name__.replace(".", "_")

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def forward(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    energy: Tensor,
    mass: Tensor,
    weighted: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return choose(w, temp.shape[0]).forward(w, temp, bias, rho, reset, energy, mass, weighted)


@forward.register_fake
def _(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    energy: Tensor,
    mass: Tensor,
    weighted: Tensor,
) -> Tensors:
    B, T, C = w.shape
    H = temp.shape[0]
    backend = choose(w, H)
    compute = torch.promote_types(w.dtype, torch.float32)
    saved = torch.promote_types(w.dtype, backend.starts_dtype)
    N = backend.saved_states(T)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return w.new_empty(shape, dtype=dtype)

    return (
        empty(B, T, C, dtype=w.dtype),
        empty(B, C, dtype=torch.float64),
        empty(B, H, dtype=torch.float64),
        empty(B, C, dtype=torch.float64),
        empty(B, T, H, dtype=compute),
        empty(B, T, H, dtype=compute),
        empty(B, N, C, dtype=saved),
        empty(B, N, H, dtype=saved),
        empty(B, N, C, dtype=saved),
    )


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def backward(
    dy: Tensor,
    d_energy: Tensor,
    d_mass: Tensor,
    d_weighted: Tensor,
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    Pi: Tensor,
    n: Tensor,
    starts_energy: Tensor,
    starts_mass: Tensor,
    starts_weighted: Tensor,
    want_rho: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved = (Pi, n, starts_energy, starts_mass, starts_weighted)
    arriving = (dy, d_energy, d_mass, d_weighted)
    return choose(w, temp.shape[0]).backward(*arriving, w, temp, bias, rho, reset, *saved, want_rho)


@backward.register_fake
def _(
    dy: Tensor,
    d_energy: Tensor,
    d_mass: Tensor,
    d_weighted: Tensor,
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    Pi: Tensor,
    n: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    per_head = Pi.new_empty(temp.shape)
    d_before = torch.empty_like(d_energy), torch.empty_like(d_mass), torch.empty_like(d_weighted)
    return (dw, per_head, torch.empty_like(n), torch.empty_like(per_head), *d_before)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, temp, bias, rho, reset, *state = inputs
    ctx.set_materialize_grads(False)  # nothing arrives at what is only saved
    ctx.state_shapes = [x.shape for x in state]
    ctx.save_for_backward(w, temp, bias, rho, reset, *output[4:])


def _backward(ctx: Any, dy: Tensor | None, *d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    w, temp, bias, rho, reset, *saved = ctx.saved_tensors
    dy = torch.zeros_like(w) if dy is None else dy
    arriving = [
        w.new_zeros(shape, dtype=torch.float64) if d is None else d
        for d, shape in zip(d_state[:3], ctx.state_shapes, strict=True)
    ]
    want_rho = rho is not None and ctx.needs_input_grad[3]
    found = Grads(*backward(dy, *arriving, w, temp, bias, rho, reset, *saved, want_rho))
    d_bias = None
    if bias is not None and ctx.needs_input_grad[2]:
        D = w.shape[-1] // temp.shape[0]
        d_bias = (D * (found.dn.sum(0) if bias.dim() == 2 else found.dn)).to(bias.dtype)
    d_rho = found.d_rho.to(rho.dtype) if want_rho else None
    return found.dw, found.d_temp.to(temp.dtype), d_bias, d_rho, None, found.d_energy, found.d_mass, found.d_weighted


forward.register_autograd(_backward, setup_context=_setup)
