"""Causal TSSA in plain PyTorch, chunk by chunk: the backend that runs everywhere.

Shapes: B sequences, T tokens, C channels = H heads x D, N blocks. Tokens are handled in blocks; inside a block every
running sum is two scans, over the rows of all chunks at once and then over the chunks. The backward pass computes again
what it needs from the state before each block; its steps are numbered as in docs/tssa.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.tssa.backend import Backend, Grads, Inputs, Saved
from tostlm.tssa.reference import EPS, EPS_MASS
from tostlm.tssa.state import State

CHUNK = 32  # tokens in the inner, row-by-row scan
BLOCK = 1024  # tokens whose temporaries are alive at once


def forward(inputs: Inputs, state: State) -> tuple[Tensor, State, Saved]:
    """See `Backend`."""
    w, bias = inputs.w, inputs.bias
    B, T, H, D = inputs.sizes
    compute = torch.promote_types(w.dtype, torch.float32)  # statistics are never narrower than fp32
    temp, decays = inputs.temp.to(compute), inputs.decays(compute)
    y = torch.empty_like(w, memory_format=torch.contiguous_format)
    s, m, c = state.energy.view(B, H, D), state.weighted.view(B, H, D), state.mass.view(B, H, 1)
    chunks = list(blocks(T))
    saved = Saved.empty(inputs, len(chunks), BACKEND.saved_dtype, BACKEND.heads_first)
    for k, block in enumerate(chunks):
        for before_chunks, carry in zip(saved.chunk_states, (s, c, m), strict=True):
            before_chunks[:, k] = carry.flatten(1)
        a = None if decays is None else decays[:, block].contiguous()
        x = w[:, block].to(compute).unflatten(-1, (H, D))
        square = x * x
        running = square.clone()
        s = scan(running, a, s)
        n_block = (square / running.clamp_min_(EPS)).sum(-1)  # [B, t, H]
        if bias is not None:
            n_block += D * bias[..., block, :]
        Pi_block = torch.softmax(temp * n_block, dim=-1)
        running = square.mul_(Pi_block[..., None])
        m = scan(running, a, m)
        mass = Pi_block[..., None].clone()
        c = scan(mass, a, c)
        mass += EPS_MASS
        gate = mass / running.add_(mass)  # 1 / (1 + weighted / mass)
        y[:, block] = gate.mul_(x).mul_(-Pi_block[..., None]).flatten(2)
        saved.Pi[:, block], saved.n[:, block] = Pi_block, n_block

    return y, State(*(x.flatten(1).clone() for x in (s, c, m))), saved


class _Block(NamedTuple):
    """What the passes after the first compute again of a block of t tokens."""

    tokens: slice
    a: Tensor | None  # [B, t, H], decays
    x: Tensor  # [B, t, H, D], w in the compute dtype
    P: Tensor  # [B, t, H, 1], memberships
    m: Tensor  # [B, t, H, D], running weighted sums
    c: Tensor  # [B, t, H, 1], running mass
    mass: Tensor  # c + EPS_MASS
    gate: Tensor  # [B, t, H, D]


def _replay(inputs: Inputs, saved: Saved) -> Iterator[tuple[int, _Block]]:
    """Yield the blocks' numbers and contents, the last block first."""
    B, T, H, D = inputs.sizes
    decays = inputs.decays(saved.Pi.dtype)
    for k, block in reversed(list(enumerate(blocks(T)))):
        a = None if decays is None else decays[:, block].contiguous()
        x = inputs.w[:, block].to(saved.Pi.dtype).unflatten(-1, (H, D))
        P = saved.Pi[:, block, :, None]
        m, c = x.square().mul_(P), P.clone()
        scan(m, a, saved.chunk_states.weighted[:, k].view(B, H, D))
        scan(c, a, saved.chunk_states.mass[:, k].view(B, H, 1))
        mass = c + EPS_MASS
        yield k, _Block(block, a, x, P, m, c, mass, mass / (m + mass))


def _gate_grads(block: _Block, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 1 and 2: A g and v [B, t, H, D], and the local gradients of m [B, t, H, D] and c [B, t, H, 1]."""
    g = grad_y[:, block.tokens].to(block.x.dtype).view(block.x.shape)
    gated = block.gate * g
    v = block.x * gated
    share = block.P / block.mass
    dm = v * block.gate
    dc = (dm - v).sum(-1, keepdim=True) * share
    return gated, v, dm.mul_(share), dc


def outputs(inputs: Inputs, saved: Saved) -> Tensor:
    """See `Backend`."""
    y = torch.empty_like(inputs.w, memory_format=torch.contiguous_format)
    for _, block in _replay(inputs, saved):
        y[:, block.tokens] = block.gate.mul_(block.x).mul_(-block.P).flatten(2)
    return y


def state_grads(inputs: Inputs, saved: Saved, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    B, _, H, D = inputs.sizes
    M = torch.zeros(B, H, D, dtype=torch.float64, device=inputs.w.device)
    Cm = M.new_zeros(B, H, 1)
    for _, block in _replay(inputs, saved):
        *_, dm, dc = _gate_grads(block, grad_y)
        M, Cm = reverse_scan(dm, block.a, M), reverse_scan(dc, block.a, Cm)
    return Cm.flatten(1), M.flatten(1)


def backward(inputs: Inputs, saved: Saved, grad_y: Tensor, grad_final_state: State, with_rho: bool) -> Grads:
    """See `Backend`."""
    w, mask = inputs.w, inputs.document_start_mask
    B, _, H, D = inputs.sizes
    compute, chunk_states = saved.Pi.dtype, saved.chunk_states
    temp = inputs.temp.to(compute)
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    grad_n = torch.empty_like(saved.n)
    grad_temp, grad_rho = (torch.zeros(H, dtype=compute, device=w.device) for _ in range(2))
    S, M = (x.view(B, H, D) for x in (grad_final_state.energy, grad_final_state.weighted))
    Cm = grad_final_state.mass.view(B, H, 1)
    for k, block in _replay(inputs, saved):
        tokens, a, x, P, m, c, _, _ = block
        square = x * x
        gated, v, dm, dc = _gate_grads(block, grad_y)
        M = reverse_scan(dm, a, M)  # step 3
        Cm = reverse_scan(dc, a, Cm)
        dPi = (dm * square - v).sum(-1) + dc[..., 0]  # step 4
        p = P[..., 0]
        dz = p * (dPi - (p * dPi).sum(-1, keepdim=True))  # step 5
        grad_temp += (dz * saved.n[:, tokens]).sum((0, 1))
        dn = temp * dz
        grad_n[:, tokens] = dn

        s, s0 = square.clone(), chunk_states.energy[:, k].view(B, H, D)  # step 6
        scan(s, a, s0)
        floored = s.clamp_min(EPS)
        direct = dn[..., None] / floored
        through = square.div_(floored).mul_(direct).masked_fill_(s < EPS, 0.0)
        # Step 7: direct and through are equal at a document's first token, and large where w is small; so they are
        # subtracted first, and what the tokens after it add comes without this token's own share.
        d_square = direct.sub_(through).addcmul_(P, dm)
        ds, incoming = through.neg_(), S
        S = reverse_scan(ds, a, incoming)
        _add_from_the_right(d_square, ds, a, incoming)
        grad_w[:, tokens] = gated.mul_(-P).addcmul_(x, d_square, value=2).flatten(2)

        if with_rho:  # step 9
            m0, c0 = chunk_states.weighted[:, k].view(B, H, D), chunk_states.mass[:, k].view(B, H, 1)
            per_token = (ds * _shifted(s, s0) + dm * _shifted(m, m0)).sum(-1) + (dc * _shifted(c, c0))[..., 0]
            if mask is not None:
                per_token = per_token.masked_fill(mask[:, tokens, None], 0.0)
            grad_rho += per_token.sum((0, 1))

    return Grads(grad_w, grad_temp, grad_n, grad_rho, State(*(x.flatten(1).clone() for x in (S, Cm, M))))


def blocks(T: int) -> Iterator[slice]:
    """Blocks of whole chunks, then the ragged rest as one short chunk."""
    whole = T - T % CHUNK
    for start in range(0, whole, BLOCK):
        yield slice(start, min(start + BLOCK, whole))
    if whole < T:
        yield slice(whole, T)


def _chunks(x: Tensor) -> Tensor:
    """View [B, T, ...] as [B, chunks, rows, ...]."""
    rows = min(CHUNK, x.shape[1])
    return x.view(x.shape[0], x.shape[1] // rows, rows, *x.shape[2:])


def scan(x: Tensor, decay: Tensor | None, carry: Tensor) -> Tensor:
    """In place x_t <- decay_t x_{t-1} + x_t along dim 1, from `carry` before the first; returns the last in float64.

    x [B, T, H, D], decay [B, T, H] or None for 1, carry [B, H, D] float64.
    """
    rows = _chunks(x)
    if decay is None:
        for t in range(1, rows.shape[2]):
            rows[:, :, t].add_(rows[:, :, t - 1])
        ends = carry[:, None] + rows[:, :, -1].double().cumsum(1)  # [B, chunks, H, D]
        starts = torch.cat([carry[:, None], ends[:, :-1]], dim=1)
        rows += starts.to(x.dtype)[:, :, None]
        return ends[:, -1]
    a = _chunks(decay)[..., None]
    for t in range(1, rows.shape[2]):
        rows[:, :, t].addcmul_(a[:, :, t], rows[:, :, t - 1])
    reach = a.cumprod(2)  # weight of the chunk's incoming carry at each row
    carries = []
    for n in range(rows.shape[1]):
        carries.append(carry)
        carry = rows[:, n, -1] + reach[:, n, -1].double() * carry
    rows.addcmul_(reach, torch.stack(carries, 1).to(x.dtype)[:, :, None])
    return carry


def reverse_scan(x: Tensor, decay: Tensor | None, carry: Tensor) -> Tensor:
    """In place x_t <- x_t + decay_{t+1} x_{t+1} along dim 1; returns decay_first x_first in float64.

    `carry` [B, H, D] float64 is what arrives from the right, already multiplied by the decay of the step it comes from.
    """
    rows = _chunks(x)
    if decay is None:
        for t in range(rows.shape[2] - 2, -1, -1):
            rows[:, :, t].add_(rows[:, :, t + 1])
        firsts = rows[:, :, 0].double()
        after = firsts.flip(1).cumsum(1).flip(1) + carry[:, None]  # [B, chunks, H, D], this chunk and all to its right
        starts = torch.cat([after[:, 1:], carry[:, None]], dim=1)
        rows += starts.to(x.dtype)[:, :, None]
        return after[:, 0]
    a = _chunks(decay)[..., None]
    for t in range(rows.shape[2] - 2, -1, -1):
        rows[:, :, t].addcmul_(a[:, :, t + 1], rows[:, :, t + 1])
    reach = torch.ones_like(a)  # product of the decays right of each row
    reach[:, :, :-1] = a[:, :, 1:].flip(2).cumprod(2).flip(2)
    carries = [carry] * rows.shape[1]
    for n in range(rows.shape[1] - 1, -1, -1):
        carries[n] = carry
        carry = a[:, n, 0].double() * (rows[:, n, 0] + reach[:, n, 0].double() * carry)
    rows.addcmul_(reach, torch.stack(carries, 1).to(x.dtype)[:, :, None])
    return carry


def _add_from_the_right(to: Tensor, x: Tensor, decay: Tensor | None, carry: Tensor) -> None:
    """In place to_t <- to_t + decay_{t+1} x_{t+1} along dim 1 of a reverse-scanned x; the last adds the carry."""
    if decay is None:
        to[:, :-1].add_(x[:, 1:])
    else:
        to[:, :-1].addcmul_(x[:, 1:], decay[:, 1:, :, None])
    to[:, -1].add_(carry)


def _shifted(x: Tensor, first: Tensor) -> Tensor:
    """x_{t-1} along dim 1, `first` before it."""
    return torch.cat([first.to(x.dtype)[:, None], x[:, :-1]], dim=1)


BACKEND = Backend(
    name="torch",
    serves=lambda device, dtype, head_width: True,
    chunk_starts=lambda T: [block.start for block in blocks(T)],
    saved_dtype=torch.float64,
    heads_first=False,
    forward=forward,
    outputs=outputs,
    state_grads=state_grads,
    backward=backward,
)
