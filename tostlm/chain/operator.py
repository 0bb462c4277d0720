"""States one after the other, each made of the one before, as one operation.

torch.compile would unroll the loop over them, and autograd record its every step; of a custom op both see one call.
The gradients of a chain run the same chain back. On NVIDIA GPUs either is one kernel (`tostlm.chain.triton`).

Shapes: B sequences, N steps, H heads, states of D x V numbers, L tokens of a step.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from tostlm.autograd import namespace

_NAMESPACE = namespace(__name__)
_CHAIN = "(Tensor added, Tensor kept, Tensor first, bool back=False) -> (Tensor, Tensor)"
_DELTA_CHAIN = (
    "(Tensor own, Tensor reads, Tensor ends, Tensor kept, Tensor? added, Tensor first, bool back=False)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(f"{_NAMESPACE}::chain", mutates_args=(), schema=_CHAIN)
def chain(added: Tensor, kept: Tensor, first: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """Return S before each of the steps S <- kept S + added [B, N, H, D, V], and S after the last [B, H, D, V].

    Args:
        added: [B, N, H, D, V], N may be 0.
        kept: [B, N, H, 1, 1], or [B, N, H, D, 1], a number for each row.
        first: [B, H, D, V], S before the first step.
        back: whether the last of N comes first.
    """
    if (kernels := _kernels(first, products=False)) is not None:
        return cast(tuple[Tensor, Tensor], kernels.chain(added, kept, first, back))
    states, state = _contiguous(added), first.clone()
    for n in step_order(added, back):
        states[:, n] = state
        state = (kept[:, n] * state).add_(added[:, n])
    return states, state


@torch.library.custom_op(f"{_NAMESPACE}::delta_chain", mutates_args=(), schema=_DELTA_CHAIN)
def delta_chain(
    own: Tensor, reads: Tensor, ends: Tensor, kept: Tensor, added: Tensor | None, first: Tensor, back: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, S before each of the steps [B, N, H, D, V], and S after the last [B, H, D, V].

    A step is u = own + reads S, S <- kept S + ends u + added: what it writes depends on what S holds already.

    Args:
        own: [B, N, H, L, V], N may be 0.
        reads: [B, N, H, L, D].
        ends: [B, N, H, D, L].
        kept, first, back: as in `chain`.
        added: [B, N, H, D, V]; None counts as zeros.
    """
    if (kernels := _kernels(first, products=True)) is not None:
        return cast(tuple[Tensor, Tensor, Tensor], kernels.delta_chain(own, reads, ends, kept, added, first, back))
    state, B, N = first.clone(), *own.shape[:2]
    written, states = _contiguous(own), first.new_empty(B, N, *first.shape[1:])
    for n in step_order(own, back):
        states[:, n] = state
        u = own[:, n] + reads[:, n] @ state
        written[:, n] = u
        state = (kept[:, n] * state).add_(ends[:, n] @ u)
        if added is not None:
            state.add_(added[:, n])
    return written, states, state


@chain.register_fake
def _(added: Tensor, kept: Tensor, first: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    return _contiguous(added), torch.empty_like(first)


@delta_chain.register_fake
def _(
    own: Tensor, reads: Tensor, ends: Tensor, kept: Tensor, added: Tensor | None, first: Tensor, back: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(own), first.new_empty(*own.shape[:2], *first.shape[1:]), torch.empty_like(first)


def _save_chain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], output[0])
    ctx.back = inputs[3]


def _chain_backward(ctx: Any, grad_states: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    kept, states = ctx.saved_tensors
    grad_added, grad_first = chain(grad_states, kept, grad_last, not ctx.back)
    return grad_added, _grad_kept(ctx.needs_input_grad[1], kept, grad_added, states), grad_first, None


def _save_delta_chain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:4], *output[:2])
    ctx.back = inputs[6]


def _delta_chain_backward(
    ctx: Any, grad_written: Tensor, grad_states: Tensor, grad_last: Tensor
) -> tuple[Tensor | None, ...]:
    reads, ends, kept, written, states = ctx.saved_tensors
    grad_own, grad_after, grad_first = delta_chain(
        grad_written, ends.mT, reads.mT, kept, grad_states, grad_last, not ctx.back
    )
    grad_kept = _grad_kept(ctx.needs_input_grad[3], kept, grad_after, states)
    return (
        grad_own,
        grad_own @ states.mT,
        grad_after @ written.mT,
        grad_kept,
        grad_after if ctx.needs_input_grad[4] else None,
        grad_first,
        None,
    )


def _grad_kept(needed: bool, kept: Tensor, grad_after: Tensor, states: Tensor) -> Tensor | None:
    return (grad_after * states).sum_to_size(kept.shape) if needed else None


def _kernels(first: Tensor, products: bool) -> ModuleType | None:
    """Return the module of the kernels that serve states like `first`, if any do."""
    reachable = first.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    module = _triton() if reachable else None
    return module if module is not None and module.serves(first, products) else None


@functools.cache
def _triton() -> ModuleType | None:
    try:
        return importlib.import_module("tostlm.chain.triton")
    except ImportError:  # no triton; or an exported model, which brings no kernels
        return None


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def step_order(steps: Tensor, back: bool) -> range:
    """Return the numbers of steps [B, N, ...] in the order that they are made in."""
    N = steps.shape[1]
    return range(N - 1, -1, -1) if back else range(N)


chain.register_autograd(_chain_backward, setup_context=_save_chain)
delta_chain.register_autograd(_delta_chain_backward, setup_context=_save_delta_chain)
