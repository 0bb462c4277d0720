"""States one after the other, S_{n+1} = kept_n S_n + added_n, as one operation.

torch.compile would unroll the loop over them, and autograd record its every step; of a custom op both see one call.

Shapes: B sequences, N steps, H heads, states of D x V numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Its own name for every copy of this module: an exported model brings one, and two of them may be loaded at once.
_NAME = f"{__name__.replace('.', '_')}::chain"


@torch.library.custom_op(_NAME, mutates_args=(), schema="(Tensor added, Tensor kept, Tensor first) -> (Tensor, Tensor)")
def chain(added: Tensor, kept: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return S before each of the steps [B, N, H, D, V], and S after the last [B, H, D, V].

    Args:
        added: [B, N, H, D, V], N may be 0.
        kept: [B, N, H, 1, 1], [B, N, H, D, 1] or [B, N, H, D, D], as `times` takes it.
        first: [B, H, D, V], S before the first step.
    """
    states, state = torch.empty_like(added, memory_format=torch.contiguous_format), first.clone()
    for n in range(added.shape[1]):
        states[:, n] = state
        state = times(kept[:, n], state).add_(added[:, n])
    return states, state


def times(kept: Tensor, state: Tensor) -> Tensor:
    """`kept` [..., 1, 1], [..., D, 1] or [..., D, D] times a state [..., D, V]."""
    return kept * state if kept.shape[-1] == 1 else kept @ state


@chain.register_fake
def _(added: Tensor, kept: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(added, memory_format=torch.contiguous_format), torch.empty_like(first)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], output[0])


def _backward(ctx: Any, grad_states: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients run the same chain, back: dS_n = kept_n^T dS_{n+1} + what arrives at S_n."""
    kept, states = ctx.saved_tensors
    wide = kept.shape[-1] > 1
    back = kept.transpose(-1, -2) if wide else kept
    grad_added, grad_first = chain(grad_states.flip(1), back.flip(1), grad_last)
    grad_added = grad_added.flip(1)  # [B, N, H, D, V], of S after each step
    grad_kept = None
    if ctx.needs_input_grad[1]:
        grad_kept = grad_added @ states.transpose(-1, -2) if wide else (grad_added * states).sum_to_size(kept.shape)
    return grad_added, grad_kept, grad_first


chain.register_autograd(_backward, setup_context=_save)
