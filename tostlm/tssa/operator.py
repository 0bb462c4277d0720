"""The operator as torch sees it: a custom op with a fake kernel and a backward pass, over whichever backend serves.

torch.compile, opcheck and activation checkpointing see one opaque call each way. A custom op takes and returns single
tensors, so this file alone flattens the named tuples of `tostlm.tssa.backend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tostlm.autograd import namespace
from tostlm.tssa.backend import Grads, Inputs, Saved, empty_per_head
from tostlm.tssa.dispatch import choose
from tostlm.tssa.state import State

_NAMESPACE = namespace(__name__)
_INPUTS = "Tensor w, Tensor temp, Tensor? bias, Tensor? rho, Tensor? document_start_mask"
_STATE = "Tensor energy, Tensor mass, Tensor weighted"
_SAVED = "Tensor Pi, Tensor n, Tensor chunk_energy, Tensor chunk_mass, Tensor chunk_weighted"
_FORWARD = f"({_INPUTS}, {_STATE}, str? backend) -> ({', '.join(['Tensor'] * 9)})"
_BACKWARD = (
    f"({_INPUTS}, {_SAVED}, Tensor grad_y, {_STATE}, bool with_rho, str? backend) -> ({', '.join(['Tensor'] * 7)})"
)


def tssa_operator(inputs: Inputs, state: State, backend: str | None) -> tuple[Tensor, State, Saved]:
    """`Backend.forward`, differentiable in y and in the final state."""
    y, energy, mass, weighted, Pi, n, *chunk_states = forward(*inputs, *state, backend)
    return y, State(energy, mass, weighted), Saved(Pi, n, State(*chunk_states))


def input_grads(
    grads: Grads, inputs: Inputs, needed: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
    """Return the gradients of each of the inputs in its dtype, where `needed` says so."""
    bias, rho, D = inputs.bias, inputs.rho, inputs.sizes[-1]
    grad_bias = grad_rho = None
    if bias is not None and needed[2]:
        grad_bias = (D * (grads.n.sum(0) if bias.dim() == 2 else grads.n)).to(bias.dtype)
    if rho is not None and needed[3]:
        grad_rho = grads.rho.to(rho.dtype)
    return grads.w, grads.temp.to(inputs.temp.dtype), grad_bias, grad_rho, None


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=(), schema=_FORWARD)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, state, backend = Inputs(*arguments[:5]), State(*arguments[5:8]), arguments[8]
    y, after, saved = choose(inputs.w, inputs.temp.shape[0], backend).forward(inputs, state)
    return y, *after, saved.Pi, saved.n, *saved.chunk_states


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, backend = Inputs(*arguments[:5]), choose(arguments[0], arguments[1].shape[0], arguments[8])
    w = inputs.w
    B, T, H, D = inputs.sizes
    saved = Saved.empty(inputs, len(backend.chunk_starts(T)), backend.saved_dtype, backend.heads_first)
    after = (w.new_empty(B, size, dtype=torch.float64) for size in (H * D, H, H * D))
    return w.new_empty(B, T, H * D), *after, saved.Pi, saved.n, *saved.chunk_states


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=(), schema=_BACKWARD)
def backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved = Inputs(*arguments[:5]), Saved(arguments[5], arguments[6], State(*arguments[7:10]))
    grad_y, grad_state, with_rho, backend = arguments[10], State(*arguments[11:14]), *arguments[14:]
    grads = choose(inputs.w, inputs.temp.shape[0], backend).backward(inputs, saved, grad_y, grad_state, with_rho)
    return *grads[:4], *grads.state


@backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, Pi = Inputs(*arguments[:5]), arguments[5]
    backend = choose(inputs.w, inputs.temp.shape[0], arguments[15])
    grad_w = torch.empty_like(inputs.w, memory_format=torch.contiguous_format)
    grad_temp, grad_rho = (Pi.new_empty(inputs.temp.shape) for _ in range(2))
    grad_n = empty_per_head(inputs, Pi.shape[1], Pi.dtype, backend.heads_first)
    return grad_w, grad_temp, grad_n, grad_rho, *map(torch.empty_like, arguments[11:14])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # nothing arrives at what is only saved
    ctx.state_shapes, ctx.backend = [x.shape for x in inputs[5:8]], inputs[8]
    ctx.save_for_backward(*inputs[:5], *output[4:])


def _backward(ctx: Any, grad_y: Tensor | None, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # activation checkpointing unpacks them once
    inputs = Inputs(*saved[:5])
    grad_state = [
        inputs.w.new_zeros(shape, dtype=torch.float64) if grad is None else grad
        for grad, shape in zip(grad_outputs[:3], ctx.state_shapes, strict=True)
    ]
    grad_y = torch.zeros_like(inputs.w) if grad_y is None else grad_y
    with_rho = inputs.rho is not None and ctx.needs_input_grad[3]
    found = backward(*saved, grad_y, *grad_state, with_rho, ctx.backend)
    grads = Grads(found[0], found[1], found[2], found[3], State(*found[4:]))
    return *input_grads(grads, inputs, ctx.needs_input_grad), *grads.state, None


forward.register_autograd(_backward, setup_context=_setup)
