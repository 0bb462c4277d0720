"""Causal token statistics self-attention (TSSA), an operator linear in the context."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.tssa.backend import Inputs
from tostlm.tssa.context_parallel import context_parallel_operator
from tostlm.tssa.dispatch import REFERENCE, BackendError, choose, requested_backend
from tostlm.tssa.operator import tssa_operator
from tostlm.tssa.reference import tssa_reference
from tostlm.tssa.state import State
from tostlm.tssa.statistics import Statistics, compute_statistics

__all__ = ["BackendError", "Inputs", "State", "Statistics", "tssa", "tssa_reference", "tssa_statistics"]


def tssa(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None = None,
    rho: Tensor | None = None,
    document_start_mask: Tensor | None = None,
    state: State | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Mix tokens causally by their running second moments.

    Args:
        w: [B, T, C], the projected tokens; C = H heads x D channels. fp32, bf16, fp16 or fp64; the statistics are
            computed in fp32 or wider whatever its dtype.
        temp: [H], temperature of the membership softmax over the heads.
        bias: [T, H] or [B, T, H], added to each channel's share of its energy (the authors' `denom_bias`).
        rho: [H] in (0, 1], the factor of every running sum per token; None is 1, the paper's operator.
        document_start_mask: [B, T] bool, True where a document begins: the sums start again from zero there.
        state: the state after the tokens before; None at the beginning of a document.
        group: a process group whose ranks hold consecutive tokens of each sequence, in the group's order. Every rank
            must call, with its own w, bias and mask, of any number of tokens, and with the same temp, rho and state,
            which is the one before the first rank's tokens. Every rank must run the backward pass too: the same tensors
            require gradients on all ranks, and each rank's loss uses one of its results.
        backend: "triton", "cpp", "torch" or "reference"; None takes the one that the environment variable
            TOSTLM_TSSA_BACKEND names, else the fastest that serves w.

    Returns:
        y [B, T, C] in w's dtype, and the state after the last token, of all ranks. Calls on consecutive pieces of a
        sequence, each with the state of the one before, equal one call on the whole. Under a group, gradients are this
        rank's share: summed over the ranks they are those of the whole.

    Raises:
        ValueError: a shape does not fit the others, or the backend does not serve w.

    Example:
        >>> w, temp = torch.randn(2, 1000, 64), torch.ones(4)
        >>> y, state = tssa(w[:, :600], temp)
        >>> rest, state = tssa(w[:, 600:], temp, state=state)  # as if in one call
        >>> state.energy.shape, state.mass.shape
        (torch.Size([2, 64]), torch.Size([2, 4]))

    Source: Token Statistics Transformer, arXiv 2412.17810; docs/tssa.md has the forward and backward equations.
    """
    y, after, _ = _call(Inputs(w, temp, bias, rho, document_start_mask), state, group, backend)
    return y, after


@torch.no_grad()
def tssa_statistics(
    inputs: Inputs, state: State | None = None, *, group: dist.ProcessGroup | None = None
) -> Statistics:
    """Return statistics of `tssa` on these inputs, of this rank's tokens."""
    y, _, Pi = _call(inputs, state, group, None)
    if Pi is None:
        raise ValueError(f"the {REFERENCE} backend has no statistics; use another")
    return compute_statistics(inputs, y, Pi)


def _call(
    inputs: Inputs, state: State | None, group: dist.ProcessGroup | None, backend: str | None
) -> tuple[Tensor, State, Tensor | None]:
    """Return y, the final state and the memberships [B, T, H], which the reference keeps to itself."""
    _check_shapes(inputs, state)
    B, _, H, D = inputs.sizes
    if requested_backend(backend) == REFERENCE:
        if group is not None:
            raise ValueError(f"the {REFERENCE} backend runs on one rank; use another where ranks share a sequence")
        y, after = tssa_reference(inputs, state)
        return y.to(inputs.w.dtype), after, None
    before = State.zeros(B, H * D, H, inputs.w.device) if state is None else state
    if group is not None:
        # Decorated where it is defined, it would import the compiler into every process that imports the operator.
        y, after, Pi = torch.compiler.disable(context_parallel_operator)(inputs, before, group, backend)
        return y, after, Pi
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *before))
    # torch's way through a custom op costs more than one token does, so a call that needs none of it goes around.
    if learns or torch.compiler.is_compiling():
        y, after, saved = tssa_operator(inputs, before, backend)
    else:
        y, after, saved = choose(inputs.w, H, backend).forward(inputs, before)
    return y, after, saved.Pi


def _check_shapes(inputs: Inputs, state: State | None) -> None:
    w, temp = inputs.w, inputs.temp
    if not w.is_floating_point():
        raise ValueError(f"w is {w.dtype}; it must be a floating-point tensor")
    if w.dim() != 3:
        raise ValueError(f"w has shape {tuple(w.shape)}; it must be [batch, tokens, channels]")
    B, T, C = w.shape
    H = temp.numel()
    if temp.dim() != 1 or H == 0 or C % H:
        raise ValueError(f"temp has shape {tuple(temp.shape)}; it must be [heads], heads dividing {C} channels")
    mask = inputs.document_start_mask
    energy, mass, weighted = state or (None, None, None)
    expected: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("bias", inputs.bias, [(T, H), (B, T, H)]),
        ("rho", inputs.rho, [(H,)]),
        ("document_start_mask", mask, [(B, T)]),
        ("state.energy", energy, [(B, C)]),
        ("state.mass", mass, [(B, H)]),
        ("state.weighted", weighted, [(B, C)]),
    ]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"document_start_mask is {mask.dtype}; it must be torch.bool")
    for name, tensor, shapes in expected:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {' or '.join(map(str, shapes))}")
