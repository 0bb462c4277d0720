"""Causal TSSA in plain PyTorch, chunk by chunk: the backend that runs everywhere.

Shapes: B sequences, T tokens, C channels = H heads x D, N blocks. Tokens are handled in blocks; inside a block every
running sum is two scans, over the rows of all chunks at once and then over the chunks. The backward pass computes again
what it needs from the state before each block; its steps are numbered as in docs/tssa.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tostlm.tssa.backend import Backend, Forward, Grads
from tostlm.tssa.reference import EPS, EPS_MASS

CHUNK = 32  # tokens in the inner, row-by-row scan
BLOCK = 1024  # tokens whose temporaries are alive at once


def forward(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    energy: Tensor,
    mass: Tensor,
    weighted: Tensor,
) -> Forward:
    """See `Backend`."""
    B, T, C = w.shape
    H = temp.shape[0]
    D = C // H
    compute = torch.promote_types(w.dtype, torch.float32)  # statistics are never narrower than fp32
    temp = temp.to(compute)
    decay = decays(rho, reset, B, T, H, compute)
    y = torch.empty_like(w, memory_format=torch.contiguous_format)
    Pi = torch.empty(B, T, H, dtype=compute, device=w.device)
    n = torch.empty_like(Pi)
    s, m, c = energy.view(B, H, D), weighted.view(B, H, D), mass.view(B, H, 1)
    starts: list[tuple[Tensor, Tensor, Tensor]] = []
    for block in blocks(T):
        starts.append((s, m, c))
        a = None if decay is None else decay[:, block].contiguous()
        x = w[:, block].to(compute).view(B, -1, H, D)
        square = x * x
        running = square.clone()
        s = scan(running, a, s)
        n_block = (square / running.clamp_min_(EPS)).sum(-1)  # [B, t, H]
        if bias is not None:
            n_block += D * (bias[block] if bias.dim() == 2 else bias[:, block])
        Pi_block = torch.softmax(temp * n_block, dim=-1)
        running = square.mul_(Pi_block[..., None])
        m = scan(running, a, m)
        mass_block = Pi_block[..., None].clone()
        c = scan(mass_block, a, c)
        mass_block += EPS_MASS
        gate = mass_block / running.add_(mass_block)  # 1 / (1 + weighted / mass)
        y[:, block] = gate.mul_(x).mul_(-Pi_block[..., None]).view(B, -1, C)
        Pi[:, block], n[:, block] = Pi_block, n_block

    def stacked(which: int, size: int) -> Tensor:
        saved = [start[which].reshape(B, size) for start in starts]
        return torch.stack(saved, 1) if saved else energy.new_empty(B, 0, size)

    after = s.reshape(B, C).clone(), c.reshape(B, H).clone(), m.reshape(B, C).clone()
    return Forward(y, *after, Pi, n, stacked(0, C), stacked(2, H), stacked(1, C))


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
) -> Grads:
    """See `Backend`."""
    B, T, C = w.shape
    H = temp.shape[0]
    D = C // H
    compute = Pi.dtype
    temp = temp.to(compute)
    decay = decays(rho, reset, B, T, H, compute)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    dn = torch.empty_like(n)
    d_temp = torch.zeros(H, dtype=compute, device=w.device)
    d_rho = torch.zeros(H, dtype=compute, device=w.device)
    S, M, Cm = d_energy.view(B, H, D), d_weighted.view(B, H, D), d_mass.view(B, H, 1)
    for k, block in reversed(list(enumerate(blocks(T)))):
        s0, m0 = starts_energy[:, k].view(B, H, D), starts_weighted[:, k].view(B, H, D)
        c0 = starts_mass[:, k].view(B, H, 1)
        a = None if decay is None else decay[:, block].contiguous()
        x = w[:, block].to(compute).view(B, -1, H, D)
        g = dy[:, block].to(compute).view(B, -1, H, D)
        square = x * x
        P = Pi[:, block, :, None]

        m = square * P
        scan(m, a, m0)
        c = P.clone()
        scan(c, a, c0)
        mass = c + EPS_MASS
        gate = mass / (m + mass)

        gated = gate * g  # steps 1 and 2
        xgated = x * gated
        share = P / mass
        dm = xgated * gate
        dc = (dm - xgated).sum(-1, keepdim=True) * share
        dm *= share
        M = reverse_scan(dm, a, M)  # step 3
        Cm = reverse_scan(dc, a, Cm)
        dPi = (dm * square - xgated).sum(-1) + dc[..., 0]  # step 4
        p = P[..., 0]
        dz = p * (dPi - (p * dPi).sum(-1, keepdim=True))  # step 5
        d_temp += (dz * n[:, block]).sum((0, 1))
        dn_block = temp * dz
        dn[:, block] = dn_block

        s = square.clone()  # step 6
        scan(s, a, s0)
        floored = s.clamp_min(EPS)
        direct = dn_block[..., None] / floored
        through = square.div_(floored).mul_(direct).masked_fill_(s < EPS, 0.0)
        # Step 7: direct and through are equal at a document's first token, and large where w is small; so they are
        # subtracted first, and what the tokens after it add comes without this token's own share.
        d_square = direct.sub_(through).addcmul_(P, dm)
        ds, arriving = through.neg_(), S
        S = reverse_scan(ds, a, arriving)
        _add_from_the_right(d_square, ds, a, arriving)
        dw[:, block] = gated.mul_(-P).addcmul_(x, d_square, value=2).view(B, -1, C)

        if want_rho:  # step 9
            per_token = (ds * _shifted(s, s0) + dm * _shifted(m, m0)).sum(-1) + (dc * _shifted(c, c0))[..., 0]
            if reset is not None:
                per_token = per_token.masked_fill(reset[:, block, None], 0.0)
            d_rho += per_token.sum((0, 1))

    before = S.reshape(B, C).clone(), Cm.reshape(B, H).clone(), M.reshape(B, C).clone()
    return Grads(dw, d_temp, dn, d_rho, *before)


def decays(rho: Tensor | None, reset: Tensor | None, B: int, T: int, H: int, dtype: torch.dtype) -> Tensor | None:
    """What the running sums are multiplied by before each token, [B, T, H], or None for 1 everywhere."""
    if rho is None and reset is None:
        return None
    source = rho if rho is not None else reset
    assert source is not None
    decay = torch.ones(H, dtype=dtype, device=source.device) if rho is None else rho.to(dtype)
    decay = decay.expand(B, T, H)
    return decay if reset is None else decay.masked_fill(reset[..., None], 0.0)


def saved_states(T: int) -> int:
    """Number of blocks of T tokens: whole ones, and the ragged rest."""
    return (T // CHUNK * CHUNK + BLOCK - 1) // BLOCK + (T % CHUNK + CHUNK - 1) // CHUNK


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
    saved_states=saved_states,
    starts_dtype=torch.float64,
    forward=forward,
    backward=backward,
)
