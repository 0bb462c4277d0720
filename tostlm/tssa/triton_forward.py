"""Triton kernels of causal TSSA. The equations and the steps' numbers are those of docs/tssa.md.

Layout in memory: w, y and their gradients are [B, T, H, D], Pi, n and grad_n [B, H, T]. Time is cut into B N chunks of
L tokens. What there is of each chunk is [B, N, H, D], or [B, H, N] where it has no channels: a program that reads one
head then reads numbers next to each other, and not one of each sector of 32 bytes. DP and HP are D and H padded to
powers of two, as Triton's tiles must be.

Each pass is three phases, because each of its two scans needs what the one before left at every token. A phase takes
what comes into its chunk, and sums what leaves it if nothing came in; `carry_kernel` then chains the chunks:

    forward     energy_sums    | carry | memberships      | carry | outputs
    backward    gate_grad_sums | carry | membership_grads | carry | input_grads

Forward, "comes in" is the state before the chunk's first token. Backward, it is the gradient from the right, already
multiplied by the decay of the token it comes from. A program is a chunk and a head, or a chunk where the softmax joins
the heads. Sums inside a chunk are fp32, between chunks fp64. No atomics: equal inputs give equal bits.

Where `rho` and `document_start` are both None nothing decays (DECAYS is False), and scans are plain sums.
"""

import triton
import triton.language as tl

from tostlm.tssa import reference

CHANNELS = tl.constexpr(4)  # next to each other of a thread: the sums between chunks in fp32 are then read at once
EPS = tl.constexpr(reference.EPS)
EPS_MASS = tl.constexpr(reference.EPS_MASS)

RUNTIME = ["T", "N", "bias_stride"]  # one compiled kernel serves every length


@triton.jit
def _compose(decay, x, next_decay, next_x):
    """(P, x) o (P', x'), the summary of two stretches of time."""
    return decay * next_decay, next_x + next_decay * x


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def scan(x, decay, start, DECAYS: tl.constexpr, REVERSE: tl.constexpr):
    """Running sums along the rows of x [L, ...]; `start` comes in at the first row, or at the last if REVERSE."""
    if DECAYS:
        reach, sums = tl.associative_scan((tl.broadcast_to(decay, x.shape), x), 0, _compose, reverse=REVERSE)
        return sums + reach * start
    else:
        return tl.cumsum(x, 0, reverse=REVERSE) + start


@triton.jit
def rows(chunk, T, N, L: tl.constexpr):
    """Tokens t [L] of a chunk and their rows in [B T, ...]; whether the row, and the one after it, is in the chunk."""
    i = tl.arange(0, L)
    t = (chunk % N) * L + i
    row = (chunk // N) * T + t
    return t, row, t < T, (t + 1 < T) & (i + 1 < L)


@triton.jit
def at_head(chunk, h, i, size, N, H: tl.constexpr):
    """Where the ith of `size` numbers of head h, of the chunk's sequence, is in memory of [B, H, size]."""
    return (chunk // N * H + h) * size + i


@triton.jit
def at_chunk(chunk, h, N, H: tl.constexpr):
    """Where the number of a chunk and head is in memory of [B, H, N]."""
    return at_head(chunk, h, chunk % N, N, N, H)


@triton.jit
def decay_at(rho, document_start, h, row, inside):
    """What the running sums are multiplied by before each token [L]; 1 outside of the chunk."""
    decay = tl.full(row.shape, 1.0, tl.float32)
    if rho is not None:
        decay *= tl.load(rho + h)
    if document_start is not None:
        decay = tl.where(tl.load(document_start + row, mask=inside, other=0) != 0, 0.0, decay)
    return tl.where(inside, decay, 1.0)


@triton.jit
def channels(DP: tl.constexpr):
    """The numbers of a head's channels, as threads share them."""
    return tl.max_contiguous(tl.arange(0, DP), min(CHANNELS, DP))


@triton.jit
def tile(row, inside, h, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Offsets and mask [L, DP] of one head's channels."""
    d = channels(DP)
    return row[:, None] * (H * D) + h * D + d[None, :], inside[:, None] & (d < D)[None, :]


@triton.jit
def load_mass(mass, chunk, h, N, H: tl.constexpr):
    """What comes into the chunk of a head's mass."""
    return tl.load(mass + at_chunk(chunk, h, N, H))


@triton.jit
def load_incoming(incoming, chunk, h, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """What comes into the chunk, [1, DP]."""
    d = channels(DP)
    return tl.load(incoming + (chunk * H + h) * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def store_sum(sums, x, chunk, h, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """What leaves the chunk, x [L, DP] summed."""
    d = channels(DP)
    tl.store(sums + (chunk * H + h) * D + d, tl.sum(x, 0), mask=d < D)


@triton.jit
def column(x, h, HP: tl.constexpr):
    """x[:, h] of a tile [L, HP]."""
    return tl.sum(tl.where(tl.arange(0, HP)[None, :] == h, x, 0.0), 1)


@triton.jit(do_not_specialize=RUNTIME)
def carry_kernel(
    sums, incoming, first, last,  # [B, N, H, D] twice, and [B, H, D] fp64 twice
    mass_sums, mass_incoming, mass_first, mass_last,  # [B, H, N] twice, and [B, H] fp64 twice; or None
    products,  # [B, H, N] fp64, of the chunks' decays
    N, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, DECAYS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What comes into every chunk, and what leaves the last: one program for WIDTH channels, and one for the mass."""
    b_h = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * WIDTH
    if start < D:
        row = b_h // H * N * H + b_h % H
        _carry(sums, incoming, first, last, products, b_h, row, H, start, N, D, WIDTH, STEP, DECAYS, REVERSE)
    elif mass_sums is not None:
        _carry(
            mass_sums, mass_incoming, mass_first, mass_last, products, b_h, b_h * N, 1, 0, N, 1, 1, STEP, DECAYS,
            REVERSE,
        )  # fmt: skip


@triton.jit
def _carry(
    sums, incoming, first, last, products, b_h, row, CHUNK_ROWS: tl.constexpr, start, N, D: tl.constexpr,
    WIDTH: tl.constexpr, STEP: tl.constexpr, DECAYS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The chain of one head: its chunks are CHUNK_ROWS rows of D numbers apart, the first at `row`."""
    d = start + channels(WIDTH)
    i = tl.arange(0, STEP)
    carry = tl.load(first + b_h * D + d, mask=d < D, other=0.0)
    for step in range(0, N + 1, STEP):
        # n is the nth chunk on the way: it takes the sum of the one before it. Those beyond N repeat what comes into
        # the Nth, which is what leaves the last chunk.
        n = step + i
        chunk = N - 1 - n if REVERSE else n
        passed = chunk + 1 if REVERSE else chunk - 1
        known = (n > 0) & (n <= N)
        at = (row + passed * CHUNK_ROWS)[:, None] * D + d[None, :]
        x = tl.load(sums + at, mask=known[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)
        product = tl.full((STEP,), 1.0, tl.float64)
        if DECAYS:
            product = tl.load(products + b_h * N + passed, mask=known, other=1.0)
        x = scan(x, product[:, None], carry[None, :], DECAYS, False)
        at = (row + chunk * CHUNK_ROWS)[:, None] * D + d[None, :]
        tl.store(incoming + at, x.to(tl.float32), mask=(n < N)[:, None] & (d < D)[None, :])
        carry = tl.sum(tl.where((i == STEP - 1)[:, None], x, 0.0), 0)
    tl.store(last + b_h * D + d, carry, mask=d < D)


@triton.jit(do_not_specialize=RUNTIME)
def energy_sums_kernel(
    w, sums, products, rho, document_start, T, N, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr,
    DECAYS: tl.constexpr,
):  # fmt: skip
    """Phase 1 of the forward pass: the energy each chunk adds, and the product of its decays."""
    chunk, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    _, row, inside, next_inside = rows(chunk, T, N, L)
    offsets, mask = tile(row, inside, h, H, D, DP)
    x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
    square = x * x
    if DECAYS:
        decay = decay_at(rho, document_start, h, row, inside)
        square *= tl.cumprod(decay_at(rho, document_start, h, row + 1, next_inside), 0, reverse=True)[:, None]
        product = tl.reduce(decay.to(tl.float64), 0, multiply)
        tl.store(products + at_chunk(chunk, h, N, H), product)
    store_sum(sums, square, chunk, h, H, D, DP)


@triton.jit(do_not_specialize=RUNTIME)
def memberships_kernel(
    w, temp, bias, bias_stride, rho, document_start, chunk_energy, Pi, n, sums_weighted, sums_mass, T, N,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Phase 2 of the forward pass: n and Pi, and what each chunk adds to `weighted` and `mass`."""
    chunk = tl.program_id(0).to(tl.int64)
    t, row, inside, next_inside = rows(chunk, T, N, L)
    heads = tl.arange(0, HP)
    per_head = at_head(chunk, heads[None, :], t[:, None], T, N, H)
    per_head_mask = inside[:, None] & (heads < H)[None, :]
    n_tile = tl.zeros((L, HP), tl.float32)
    for h in range(H):
        offsets, mask = tile(row, inside, h, H, D, DP)
        x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
        start = load_incoming(chunk_energy, chunk, h, H, D, DP)
        energy = scan(x * x, decay_at(rho, document_start, h, row, inside)[:, None], start, DECAYS, False)
        n_tile = tl.where(heads[None, :] == h, tl.sum(x * x / tl.maximum(energy, EPS), 1)[:, None], n_tile)
    if bias is not None:
        at = (chunk // N) * bias_stride + t[:, None] * H + heads[None, :]
        n_tile += D * tl.load(bias + at, mask=per_head_mask, other=0.0)
    tl.store(n + per_head, n_tile, mask=per_head_mask)
    z = n_tile * tl.load(temp + heads, mask=heads < H, other=0.0)[None, :]
    z = tl.where((heads < H)[None, :], z, -float("inf"))
    z = tl.exp(z - tl.max(z, 1)[:, None])
    Pi_tile = tl.where(inside[:, None], z / tl.sum(z, 1)[:, None], 0.0)
    tl.store(Pi + per_head, Pi_tile, mask=per_head_mask)
    for h in range(H):
        offsets, mask = tile(row, inside, h, H, D, DP)
        x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
        p = column(Pi_tile, h, HP)
        if DECAYS:
            p *= tl.cumprod(decay_at(rho, document_start, h, row + 1, next_inside), 0, reverse=True)
        store_sum(sums_weighted, x * x * p[:, None], chunk, h, H, D, DP)
        tl.store(sums_mass + at_chunk(chunk, h, N, H), tl.sum(p, 0))


@triton.jit
def gates(
    x, p, decay, chunk_weighted, chunk_mass, chunk, h, N, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DECAYS: tl.constexpr,
):  # fmt: skip
    """m_t [L, DP], c'_t [L] and A_t [L, DP] of a chunk."""
    start = load_incoming(chunk_weighted, chunk, h, H, D, DP)
    m = scan(x * x * p[:, None], decay[:, None], start, DECAYS, False)
    mass = scan(p, decay, load_mass(chunk_mass, chunk, h, N, H), DECAYS, False) + EPS_MASS
    return m, mass, mass[:, None] / (mass[:, None] + m)


@triton.jit(do_not_specialize=RUNTIME)
def outputs_kernel(
    w, y, Pi, rho, document_start, chunk_weighted, chunk_mass, T, N, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    L: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Phase 3 of the forward pass: y."""
    chunk, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    t, row, inside, _ = rows(chunk, T, N, L)
    offsets, mask = tile(row, inside, h, H, D, DP)
    x = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(Pi + at_head(chunk, h, t, T, N, H), mask=inside, other=0.0)
    decay = decay_at(rho, document_start, h, row, inside)
    _, _, gate = gates(x, p, decay, chunk_weighted, chunk_mass, chunk, h, N, H, D, DP, DECAYS)
    tl.store(y + offsets, (-x * p[:, None] * gate).to(y.dtype.element_ty), mask=mask)


@triton.jit
def one_token_kernel(
    w, temp, bias, bias_stride, rho, document_start, energy, mass, weighted,
    y, energy_after, mass_after, weighted_after, Pi, n, chunk_energy, chunk_mass, chunk_weighted,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of one token, a sequence a program: what decoding calls."""
    b = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HP), tl.max_contiguous(tl.arange(0, DP), 2)  # two of the state in fp64 are read at once
    is_head = h < H
    at_head = b * H + h
    mask = is_head[:, None] & (d < D)[None, :]
    at = at_head[:, None] * D + d[None, :]
    x = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    square = x * x
    s = tl.load(energy + at, mask=mask, other=0.0)
    m = tl.load(weighted + at, mask=mask, other=0.0)
    c = tl.load(mass + at_head, mask=is_head, other=0.0)
    tl.store(chunk_energy + at, s.to(tl.float32), mask=mask)
    tl.store(chunk_weighted + at, m.to(tl.float32), mask=mask)
    tl.store(chunk_mass + at_head, c.to(tl.float32), mask=is_head)
    decay = tl.full((HP,), 1.0, tl.float64)
    if rho is not None:
        decay *= tl.load(rho + h, mask=is_head, other=1.0)
    if document_start is not None:
        decay = tl.where(tl.load(document_start + b) != 0, 0.0, decay)
    s = decay[:, None] * s + square
    n_tile = tl.sum(square / tl.maximum(s.to(tl.float32), EPS), 1)
    if bias is not None:
        n_tile += D * tl.load(bias + b * bias_stride + h, mask=is_head, other=0.0)
    z = tl.where(is_head, n_tile * tl.load(temp + h, mask=is_head, other=0.0), -float("inf"))
    z = tl.exp(z - tl.max(z, 0))
    p = z / tl.sum(z, 0)
    m = decay[:, None] * m + p[:, None] * square
    c = decay * c + p
    c_floored = (c.to(tl.float32) + EPS_MASS)[:, None]
    gate = c_floored / (c_floored + m.to(tl.float32))
    tl.store(y + at, (-x * p[:, None] * gate).to(y.dtype.element_ty), mask=mask)
    tl.store(Pi + at_head, p, mask=is_head)
    tl.store(n + at_head, n_tile, mask=is_head)
    tl.store(energy_after + at, s, mask=mask)
    tl.store(weighted_after + at, m, mask=mask)
    tl.store(mass_after + at_head, c, mask=is_head)
