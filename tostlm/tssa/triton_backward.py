"""Triton kernels of the backward pass of causal TSSA; `triton_forward` has the layout and the phases."""

import triton
import triton.language as tl

from tostlm.tssa.triton_forward import (
    EPS,
    EPS_MASS,
    RUNTIME,
    at_chunk,
    at_head,
    column,
    decay_at,
    gates,
    load_incoming,
    load_mass,
    multiply,
    rows,
    scan,
    store_sum,
    tile,
)


@triton.jit
def _gate_grads(x, g, p, m, mass, gate):
    """Steps 1 and 2: v_t [L, DP], and the local gradients e_t [L, DP] and f_t [L] of m_t and c_t."""
    v = x * gate * g
    share = p / mass
    return v, v * gate * share[:, None], -tl.sum(v * (1 - gate), 1) * share


@triton.jit(do_not_specialize=RUNTIME)
def gate_grad_sums_kernel(
    grad_y, w, Pi, rho, document_start, chunk_weighted, chunk_mass, sums_weighted, sums_mass, products, T, N,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Phase 1: what each chunk adds to the gradients of `weighted` and `mass`, and the product of its decays."""
    chunk, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    t, row, inside, _ = rows(chunk, T, N, L)
    offsets, mask = tile(row, inside, h, H, D, DP)
    x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_y + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(Pi + at_head(chunk, h, t, T, N, H), mask=inside, other=0.0)
    decay = decay_at(rho, document_start, h, row, inside)
    m, mass, gate = gates(x, p, decay, chunk_weighted, chunk_mass, chunk, h, N, H, D, DP, DECAYS)
    _, e, f = _gate_grads(x, g, p, m, mass, gate)
    if DECAYS:
        reach = tl.cumprod(decay, 0)
        e *= reach[:, None]
        f *= reach
        product = tl.reduce(decay.to(tl.float64), 0, multiply)
        tl.store(products + at_chunk(chunk, h, N, H), product)
    store_sum(sums_weighted, e, chunk, h, H, D, DP)
    tl.store(sums_mass + at_chunk(chunk, h, N, H), tl.sum(f, 0))


@triton.jit(do_not_specialize=RUNTIME)
def membership_grads_kernel(
    grad_y, w, temp, rho, document_start, Pi, n, chunk_energy, chunk_weighted, chunk_mass,
    incoming_weighted, incoming_mass, grad_n, temp_sums, sums_energy, T, N,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Phase 2, steps 3 to 6: grad_n, and what each chunk adds to the gradients of temp and `energy`."""
    chunk = tl.program_id(0).to(tl.int64)
    t, row, inside, next_inside = rows(chunk, T, N, L)
    heads = tl.arange(0, HP)
    per_head = at_head(chunk, heads[None, :], t[:, None], T, N, H)
    per_head_mask = inside[:, None] & (heads < H)[None, :]
    dPi = tl.zeros((L, HP), tl.float32)
    for h in range(H):
        offsets, mask = tile(row, inside, h, H, D, DP)
        x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_y + offsets, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(Pi + at_head(chunk, h, t, T, N, H), mask=inside, other=0.0)
        decay = decay_at(rho, document_start, h, row, inside)
        next_decay = decay_at(rho, document_start, h, row + 1, next_inside)
        m, mass, gate = gates(x, p, decay, chunk_weighted, chunk_mass, chunk, h, N, H, D, DP, DECAYS)
        v, e, f = _gate_grads(x, g, p, m, mass, gate)
        incoming = load_incoming(incoming_weighted, chunk, h, H, D, DP)
        dm = scan(e, next_decay[:, None], incoming, DECAYS, True)
        dc = scan(f, next_decay, load_mass(incoming_mass, chunk, h, N, H), DECAYS, True)
        dPi = tl.where(heads[None, :] == h, (tl.sum(dm * x * x - v, 1) + dc)[:, None], dPi)
    Pi_tile = tl.load(Pi + per_head, mask=per_head_mask, other=0.0)
    dz = Pi_tile * (dPi - tl.sum(Pi_tile * dPi, 1)[:, None])
    n_tile = tl.load(n + per_head, mask=per_head_mask, other=0.0)
    tl.store(temp_sums + chunk * H + heads, tl.sum(dz * n_tile, 0), mask=heads < H)
    dn_tile = dz * tl.load(temp + heads, mask=heads < H, other=0.0)[None, :]
    tl.store(grad_n + per_head, dn_tile, mask=per_head_mask)
    for h in range(H):
        offsets, mask = tile(row, inside, h, H, D, DP)
        x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
        decay = decay_at(rho, document_start, h, row, inside)
        start = load_incoming(chunk_energy, chunk, h, H, D, DP)
        energy = scan(x * x, decay[:, None], start, DECAYS, False)
        ds = -_through_energy(x * x, energy, column(dn_tile, h, HP)[:, None])
        if DECAYS:
            ds *= tl.cumprod(decay, 0)[:, None]
        store_sum(sums_energy, ds, chunk, h, H, D, DP)


@triton.jit
def _through_energy(square, energy, grad_n):
    """[s >= eps] grad_n u / s^2, minus the local gradient of s_t."""
    floored = tl.maximum(energy, EPS)
    return tl.where(energy >= EPS, grad_n / floored * (square / floored), 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def input_grads_kernel(
    grad_y, w, rho, document_start, Pi, grad_n, chunk_energy, chunk_weighted, chunk_mass,
    incoming_energy, incoming_weighted, incoming_mass, grad_w, rho_sums, T, N,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Phase 3, steps 6, 7 and 9: grad_w, and where `rho_sums` is given what each chunk adds to the gradient of rho."""
    chunk, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    t, row, inside, next_inside = rows(chunk, T, N, L)
    offsets, mask = tile(row, inside, h, H, D, DP)
    next_offsets, next_mask = tile(row + 1, next_inside, h, H, D, DP)
    x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
    square = x * x
    decay = decay_at(rho, document_start, h, row, inside)
    next_decay = decay_at(rho, document_start, h, row + 1, next_inside)

    energy = scan(square, decay[:, None], load_incoming(chunk_energy, chunk, h, H, D, DP), DECAYS, False)
    dn_own = tl.load(grad_n + at_head(chunk, h, t, T, N, H), mask=inside, other=0.0)[:, None]
    floored = tl.maximum(energy, EPS)
    # grad_n / s minus its part through the energy. At a document's first token s - u is 0 exactly, whatever the
    # rounding of a division.
    d_square = dn_own / floored * tl.where(energy >= EPS, (energy - square) / floored, 1.0)
    # a_{t+1} Sb_{t+1} is scanned without the token's own term, which is large there and would leave its rounding.
    next_x = tl.load(w + next_offsets, mask=next_mask, other=0.0).to(tl.float32)
    next_dn = tl.load(grad_n + at_head(chunk, h, t + 1, T, N, H), mask=next_inside, other=0.0)[:, None]
    next_square = next_x * next_x
    next_ds = -_through_energy(next_square, next_decay[:, None] * energy + next_square, next_dn)
    incoming = load_incoming(incoming_energy, chunk, h, H, D, DP)
    later_ds = scan(next_decay[:, None] * next_ds, next_decay[:, None], incoming, DECAYS, True)
    d_square += later_ds
    if rho_sums is not None:
        # rho drho as sum_t a_{t+1} (Sb_{t+1} s_t + ...): step 9 with t one lower; t = 0 is the caller's. Its two scans
        # are summed apart, as the registers do not hold the tiles of both.
        of_rho = tl.sum(later_ds * energy, 1)

    g = tl.load(grad_y + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(Pi + at_head(chunk, h, t, T, N, H), mask=inside, other=0.0)
    m, mass, gate = gates(x, p, decay, chunk_weighted, chunk_mass, chunk, h, N, H, D, DP, DECAYS)
    _, e, f = _gate_grads(x, g, p, m, mass, gate)
    dm = scan(e, next_decay[:, None], load_incoming(incoming_weighted, chunk, h, H, D, DP), DECAYS, True)
    d_square += p[:, None] * dm
    tl.store(grad_w + offsets, (2 * x * d_square - p[:, None] * gate * g).to(grad_w.dtype.element_ty), mask=mask)

    if rho_sums is not None:
        dc = scan(f, next_decay, load_mass(incoming_mass, chunk, h, N, H), DECAYS, True)
        of_rho += tl.sum((dm - e) * m, 1) + (dc - f) * (mass - EPS_MASS)
        tl.store(rho_sums + chunk * H + h, tl.sum(tl.where(t + 1 < T, of_rho, 0.0), 0))
