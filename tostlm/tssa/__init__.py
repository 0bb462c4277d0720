"""Causal token statistics self-attention (TSSA), linear in the context. Imports torch alone."""

from __future__ import annotations

import os
from typing import Literal, overload

import torch
from torch import Tensor

from tostlm.tssa.dispatch import REFERENCE, VARIABLE, choose
from tostlm.tssa.operator import forward as differentiable_forward
from tostlm.tssa.reference import tssa_reference
from tostlm.tssa.state import State
from tostlm.tssa.statistics import Statistics, statistics

__all__ = ["State", "Statistics", "tssa", "tssa_reference"]


@overload
def tssa(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None = None,
    rho: Tensor | None = None,
    reset: Tensor | None = None,
    state: State | None = None,
    *,
    return_stats: Literal[False] = False,
) -> tuple[Tensor, State]: ...


@overload
def tssa(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None = None,
    rho: Tensor | None = None,
    reset: Tensor | None = None,
    state: State | None = None,
    *,
    return_stats: Literal[True],
) -> tuple[Tensor, State, Statistics]: ...


def tssa(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None = None,
    rho: Tensor | None = None,
    reset: Tensor | None = None,
    state: State | None = None,
    *,
    return_stats: bool = False,
) -> tuple[Tensor, State] | tuple[Tensor, State, Statistics]:
    """Mix tokens causally by their running second moments.

    Args:
        w: [B, T, C], the projected tokens; C = H heads x D channels. fp32, bf16, fp16 or fp64; the statistics are
            computed in fp32 or wider whatever its dtype.
        temp: [H], temperature of the membership softmax over the heads.
        bias: [T, H] or [B, T, H], added to each channel's share of its energy (the authors' `denom_bias`).
        rho: [H] in (0, 1], how much of every running sum a token leaves; None is 1, the paper's operator.
        reset: [B, T] bool, True where a document begins: the sums start again from zero there.
        state: what the tokens before left; None is the beginning of a document.
        return_stats: also return `Statistics`, the call's memberships, gates and horizons in numbers.

    Returns:
        y [B, T, C] in w's dtype, and the state after the last token. Calls on consecutive pieces of a sequence, each
        with the state of the one before, equal one call on the whole.

    Raises:
        ValueError: a shape does not fit the others.

    Source: Token Statistics Transformer, arXiv 2412.17810; docs/tssa.md has the forward and backward equations.
    """
    _check(w, temp, bias, rho, reset, state)
    if os.environ.get(VARIABLE) == REFERENCE:
        if return_stats:
            raise ValueError(f"the {REFERENCE} backend has no statistics; unset {VARIABLE}")
        y, state = tssa_reference(w, temp, bias, rho, reset, state)
        return y.to(w.dtype), state
    B, _, C = w.shape
    H = temp.shape[0]
    before = State.zeros(B, C, H, w.device) if state is None else state
    arguments = (w, temp, bias, rho, reset, *before)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
    # torch's way through a custom op costs more than one token does, so a call that needs none of it goes around.
    call = differentiable_forward if learns or torch.compiler.is_compiling() else choose(w, H).forward
    y, energy, mass, weighted, Pi, *_ = call(*arguments)
    after = State(energy, mass, weighted)
    return (y, after, statistics(w, y, Pi, rho, reset)) if return_stats else (y, after)


def _check(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    state: State | None,
) -> None:
    if w.dim() != 3:
        raise ValueError(f"w has shape {tuple(w.shape)}; it must be [batch, tokens, channels]")
    B, T, C = w.shape
    H = temp.numel()
    if temp.dim() != 1 or H == 0 or C % H:
        raise ValueError(f"temp has shape {tuple(temp.shape)}; it must be [heads], heads dividing {C} channels")
    expected: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("bias", bias, [(T, H), (B, T, H)]),
        ("rho", rho, [(H,)]),
        ("reset", reset, [(B, T)]),
    ]
    if state is not None:
        expected += [
            ("state.energy", state.energy, [(B, C)]),
            ("state.mass", state.mass, [(B, H)]),
            ("state.weighted", state.weighted, [(B, C)]),
        ]
    for name, tensor, shapes in expected:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {' or '.join(map(str, shapes))}")
