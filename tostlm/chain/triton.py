"""`chain` and `delta_chain` on NVIDIA GPUs: one kernel is the whole chain, each of its programs for some of a state.

Names and layouts are those of `tostlm.chain.operator`, all contiguous. Importing this needs triton. With
TRITON_INTERPRET=1 it serves the CPU too, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a state in a program of `chain`
# A program of `delta_chain` has some columns of a state: few, as it goes along the whole sequence. Their rows are in
# groups, which divide the products among warps, and tokens are taken some at a time: so all of it fits the registers.
STATE, WIDEST, GROUP, TOKENS = 4096, 16, 16, 16  # numbers of a program's state, its columns at most; rows; tokens
MOST_GROUPS = 16  # of states so tall that they would be more, the groups have more rows
WARPS = 4  # or as many as there are groups
LARGEST_D = 512
PRECISION = tl.constexpr("tf32x3")  # fp32 on tensor cores: each factor is three numbers of theirs


def serves(first: Tensor, products: bool) -> bool:
    """Whether the kernels serve states like `first` [B, H, D, V], and the products of matrices of `delta_chain`."""
    if products:
        return first.dtype == torch.float32 and first.shape[-2] <= LARGEST_D
    return first.dtype in (torch.float32, torch.float64)


def chain(added: Tensor, kept: Tensor, first: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """See `tostlm.chain.chain`."""
    _, N, H, D, V = added.shape
    added, kept, first = added.contiguous(), kept.contiguous(), first.contiguous()
    states, last = torch.empty_like(added), torch.empty_like(first)
    grid = (first.shape[0] * H, triton.cdiv(D * V, ELEMENTS))
    _launch(chain_kernel, grid, 4, added, kept, first, states, last, N, H, D, V, kept.shape[3], ELEMENTS, back)
    return states, last


def delta_chain(
    own: Tensor, reads: Tensor, ends: Tensor, kept: Tensor, added: Tensor | None, first: Tensor, back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `tostlm.chain.delta_chain`."""
    (B, N, H, L, V), D = own.shape, first.shape[-2]
    own, reads, ends, kept, first = (x.contiguous() for x in (own, reads, ends, kept, first))
    added = None if added is None else added.contiguous()
    written, last, states = torch.empty_like(own), torch.empty_like(first), first.new_empty(B, N, H, D, V)
    groups = min(triton.next_power_of_2(triton.cdiv(D, GROUP)), MOST_GROUPS)
    group = max(triton.next_power_of_2(triton.cdiv(D, groups)), GROUP)
    width = min(WIDEST, STATE // (groups * group))
    _launch(
        delta_chain_kernel, (B * H, triton.cdiv(V, width)), max(WARPS, groups),
        own, reads, ends, kept, added, first, written, states, last,
        N, H, L, D, V, kept.shape[3], groups, group, TOKENS, width, back,
    )  # fmt: skip
    return written, states, last


def _launch(kernel: Any, grid: tuple[int, int], warps: int, *arguments: Any) -> None:
    if 0 not in grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, num_warps=warps, num_stages=1)


@triton.jit
def row(b_h, step, N, H: tl.constexpr, BACK: tl.constexpr):
    """Where a step of a head of a sequence is in [B, N, H]."""
    return (b_h // H * N + (N - 1 - step if BACK else step)) * H + b_h % H


@triton.jit(do_not_specialize=["N"])
def chain_kernel(
    added, kept, first, states, last, N, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """All steps of a head of a sequence, for ELEMENTS numbers of its state. ROWS is D where `kept` has rows, else 1."""
    b_h = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = i < D * V
    state = tl.load(first + b_h * D * V + i, mask=inside)
    for step in range(N):
        at = row(b_h, step, N, H, BACK)
        tl.store(states + at * D * V + i, state, mask=inside)
        k = tl.load(kept + at * ROWS + i // V % ROWS, mask=inside)
        state = k * state + tl.load(added + at * D * V + i, mask=inside)
    tl.store(last + b_h * D * V + i, state, mask=inside)


@triton.jit(do_not_specialize=["N"])
def delta_chain_kernel(
    own, reads, ends, kept, added, first, written, states, last,
    N, H: tl.constexpr, L: tl.constexpr, D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """All steps of a head of a sequence, for WIDTH columns of its state: [GROUPS, GROUP, WIDTH]. ROWS as above."""
    b_h = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    d = (tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[:, :, None]  # rows [GROUPS, GROUP, 1]
    of_state, in_state = d * V + v, (d < D) & (v < V)
    state = tl.load(first + b_h * D * V + of_state, mask=in_state, other=0.0)
    for step in range(N):
        at = row(b_h, step, N, H, BACK)
        tl.store(states + at * D * V + of_state, state, mask=in_state)
        after = tl.load(kept + at * ROWS + d % ROWS, mask=d < D, other=0.0) * state
        if added is not None:
            after += tl.load(added + at * D * V + of_state, mask=in_state, other=0.0)
        for start in range(0, L, TOKENS):
            t = start + tl.arange(0, TOKENS)
            of_tokens, in_tokens = t[:, None] * V + v[None, :], (t < L)[:, None] & (v < V)[None, :]
            in_pairs = (d < D) & (t < L)  # [GROUPS, GROUP, TOKENS]
            read = tl.load(reads + at * L * D + t * D + d, mask=in_pairs, other=0.0)
            u = tl.load(own + at * L * V + of_tokens, mask=in_tokens, other=0.0)
            u += tl.sum(tl.dot(tl.permute(read, (0, 2, 1)), state, input_precision=PRECISION), 0)
            tl.store(written + at * L * V + of_tokens, u, mask=in_tokens)
            end = tl.load(ends + at * D * L + d * L + t, mask=in_pairs, other=0.0)
            u = tl.broadcast_to(u[None, :, :], (GROUPS, TOKENS, WIDTH))
            after = tl.dot(end, u, after, input_precision=PRECISION)
        state = after
    tl.store(last + b_h * D * V + of_state, state, mask=in_state)
