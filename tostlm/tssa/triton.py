"""Causal TSSA on NVIDIA GPUs: the backend over the kernels of `triton_forward` and `triton_backward`.

Shapes: B sequences, T tokens, C channels = H heads x D, N chunks. Importing this needs triton (`pip install
tostlm[triton]`). With TRITON_INTERPRET=1 it serves the CPU too, for tests: slow, but by the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tostlm.tssa import triton_backward, triton_forward
from tostlm.tssa.backend import Backend, Forward, Grads
from tostlm.tssa.state import State

CHUNK = 32  # tokens; the tiles of 64 do not fit the registers of the backward pass
CARRY_CHANNELS = 16  # of one program that chains chunks: few, as it goes along the whole sequence,
CARRY_CHUNKS = 64  # this many chunks at a time
TILE_PER_WARP = 256  # elements, 8 a thread
MAX_WARPS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_WIDTHS = range(16, 257)


def serves(device: str, dtype: torch.dtype, head_width: int) -> bool:
    """See `Backend`."""
    reachable = device == "cuda" or (device == "cpu" and triton.knobs.runtime.interpret)
    return reachable and dtype in DTYPES and head_width in HEAD_WIDTHS


def saved_states(T: int) -> int:
    """Number of chunks of T tokens."""
    return -(-T // CHUNK)


def _warps(elements: int) -> int:
    """How many warps work on a tile."""
    return min(max(1, elements // TILE_PER_WARP), MAX_WARPS)


@dataclass(frozen=True)
class _Call:
    """The inputs of both passes as the kernels read them, and how kernels are launched over them."""

    w: Tensor
    temp: Tensor
    rho: Tensor | None
    reset: Tensor | None

    @classmethod
    def of(cls, w: Tensor, temp: Tensor, rho: Tensor | None, reset: Tensor | None) -> _Call:
        return cls(
            w.contiguous(),
            temp.float().contiguous(),
            None if rho is None else rho.float().contiguous(),
            None if reset is None else reset.contiguous().view(torch.uint8),
        )

    @property
    def heads(self) -> int:
        return self.temp.shape[0]

    @property
    def head_width(self) -> int:
        return self.w.shape[2] // self.heads

    @property
    def chunks(self) -> int:
        return saved_states(self.w.shape[1])

    @property
    def decays(self) -> bool:
        return self.rho is not None or self.reset is not None

    def per_head(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty [B, N, H]."""
        return self.w.new_empty((self.w.shape[0], self.chunks, self.heads), dtype=dtype)

    def per_channel(self) -> Tensor:
        """An empty [B, N, C]."""
        return self.w.new_empty((self.w.shape[0], self.chunks, self.w.shape[2]), dtype=torch.float32)

    def states(self) -> State:
        """An empty state a chunk."""
        return State(self.per_channel(), self.per_head(), self.per_channel())

    def over_heads(self, kernel: Any, **others: Tensor | None) -> None:
        """Launch a program for each chunk and head."""
        grid = (self.w.shape[0] * self.chunks * self.heads,)
        kernel[grid](w=self.w, **others, **self._tiles())

    def over_chunks(self, kernel: Any, **others: Tensor | int | None) -> None:
        """Launch a program for each chunk."""
        grid = (self.w.shape[0] * self.chunks,)
        HP = triton.next_power_of_2(self.heads)
        kernel[grid](w=self.w, temp=self.temp, HP=HP, **others, **self._tiles())

    def _tiles(self) -> dict[str, Any]:
        D = self.head_width
        DP = triton.next_power_of_2(D)
        sizes = {"T": self.w.shape[1], "N": self.chunks, "H": self.heads, "D": D, "DP": DP, "L": CHUNK}
        decay = {"rho": self.rho, "reset": self.reset, "DECAYS": self.decays}
        return {**sizes, **decay, "num_warps": _warps(CHUNK * DP)}


class _Chain(NamedTuple):
    """Sums of the chunks, and what `carry_kernel` makes of them."""

    sums: State  # [B, N, ...]
    incoming: State  # [B, N, ...], what comes into each chunk
    first: State  # [B, ...] float64, what comes into the first on the way
    last: State  # [B, ...] float64, what leaves the last
    products: Tensor | None  # [B, N, H] float64, of each chunk's decays
    reverse: bool

    def carry_energy(self) -> None:
        """The first scan's."""
        self._carry([x.energy for x in self[:4]], [None] * 4)

    def carry_weighted_and_mass(self) -> None:
        """The second scan's."""
        self._carry([x.weighted for x in self[:4]], [x.mass for x in self[:4]])

    def _carry(self, channels: Sequence[Tensor], mass: Sequence[Tensor | None]) -> None:
        B, N, H = self.sums.mass.shape
        D = self.sums.energy.shape[2] // H
        programs = triton.cdiv(D, CARRY_CHANNELS) + (mass[0] is not None)
        triton_forward.carry_kernel[(B * H, programs)](
            *channels, *mass, self.products, N, H, D, WIDTH=CARRY_CHANNELS, STEP=CARRY_CHUNKS,
            DECAYS=self.products is not None, REVERSE=self.reverse, num_warps=4,
        )  # fmt: skip


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
    B, T, _ = w.shape
    call = _Call.of(w, temp, rho, reset)
    before = State(energy.contiguous(), mass.contiguous(), weighted.contiguous())
    after = State(*(torch.empty_like(x) for x in before))
    Pi, n = (w.new_empty((B, T, call.heads), dtype=torch.float32) for _ in range(2))
    result = Forward(torch.empty_like(call.w), *after, Pi, n, *call.states())
    if B * T == 0:
        for x, start in zip(after, before, strict=True):
            x.copy_(start)
        return result
    bias = None if bias is None else bias.float().contiguous()
    bias_stride = T * call.heads if bias is not None and bias.dim() == 3 else 0
    with torch.cuda.device_of(w):
        (_one_token if T == 1 else _chunks)(call, bias, bias_stride, before, result)
    return result


def _one_token(call: _Call, bias: Tensor | None, bias_stride: int, before: State, result: Forward) -> None:
    H, D = call.heads, call.head_width
    HP, DP = triton.next_power_of_2(H), triton.next_power_of_2(D)
    triton_forward.one_token_kernel[(call.w.shape[0],)](
        call.w, call.temp, bias, bias_stride, call.rho, call.reset, *before, *result,
        H, HP, D, DP, num_warps=_warps(HP * DP),
    )  # fmt: skip


def _chunks(call: _Call, bias: Tensor | None, bias_stride: int, before: State, result: Forward) -> None:
    starts = State(result.starts_energy, result.starts_mass, result.starts_weighted)
    after = State(result.energy, result.mass, result.weighted)
    products = call.per_head(torch.float64) if call.decays else None
    chain = _Chain(call.states(), starts, before, after, products, reverse=False)
    call.over_heads(triton_forward.energy_sums_kernel, sums=chain.sums.energy, products=products)
    chain.carry_energy()
    call.over_chunks(
        triton_forward.memberships_kernel, bias=bias, bias_stride=bias_stride, starts_energy=starts.energy,
        Pi=result.Pi, n=result.n, sums_weighted=chain.sums.weighted, sums_mass=chain.sums.mass,
    )  # fmt: skip
    chain.carry_weighted_and_mass()
    call.over_heads(
        triton_forward.outputs_kernel, y=result.y, Pi=result.Pi,
        starts_weighted=starts.weighted, starts_mass=starts.mass,
    )  # fmt: skip


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
    B, T, _ = w.shape
    call = _Call.of(w, temp, rho, reset)
    after = State(d_energy.contiguous(), d_mass.contiguous(), d_weighted.contiguous())
    before = State(*(torch.empty_like(x) for x in after))
    dw, dn = torch.empty_like(call.w), torch.empty_like(n)
    d_temp, d_rho = torch.zeros_like(call.temp), torch.zeros_like(call.temp)
    if B * T == 0:
        return Grads(dw, d_temp, dn, d_rho, *(x.clone() for x in after))
    temp_sums, rho_sums = call.per_head(), call.per_head() if want_rho else None
    starts = State(starts_energy, starts_mass, starts_weighted)
    with torch.cuda.device_of(w):
        _chunks_back(call, dy.contiguous(), Pi, n, starts, after, before, dw, dn, temp_sums, rho_sums)
    d_temp += temp_sums.sum((0, 1), dtype=torch.float64)
    if rho_sums is not None:
        assert call.rho is not None
        total = rho_sums.sum((0, 1), dtype=torch.float64)
        for d, start in zip(before, starts, strict=True):  # the first token's share
            total += (d * start[:, 0]).view(B, call.heads, -1).sum((0, 2))
        d_rho += total / call.rho
    return Grads(dw, d_temp, dn, d_rho, *before)


def _chunks_back(
    call: _Call,
    dy: Tensor,
    Pi: Tensor,
    n: Tensor,
    starts: State,
    after: State,
    before: State,
    dw: Tensor,
    dn: Tensor,
    temp_sums: Tensor,
    rho_sums: Tensor | None,
) -> None:
    """Fills `before`, `dw`, `dn`, and the chunks' shares of d_temp and of rho d_rho."""
    products = call.per_head(torch.float64) if call.decays else None
    chain = _Chain(call.states(), call.states(), after, before, products, reverse=True)
    sums, arriving = chain.sums, chain.incoming
    call.over_heads(
        triton_backward.gate_adjoint_sums_kernel, dy=dy, Pi=Pi, starts_weighted=starts.weighted,
        starts_mass=starts.mass, sums_weighted=sums.weighted, sums_mass=sums.mass, products=products,
    )  # fmt: skip
    chain.carry_weighted_and_mass()
    call.over_chunks(
        triton_backward.membership_adjoints_kernel, dy=dy, Pi=Pi, n=n, starts_energy=starts.energy,
        starts_weighted=starts.weighted, starts_mass=starts.mass, arriving_weighted=arriving.weighted,
        arriving_mass=arriving.mass, dn=dn, temp_sums=temp_sums, sums_energy=sums.energy,
    )  # fmt: skip
    chain.carry_energy()
    call.over_heads(
        triton_backward.input_adjoints_kernel, dy=dy, Pi=Pi, dn=dn, starts_energy=starts.energy,
        starts_weighted=starts.weighted, starts_mass=starts.mass, arriving_energy=arriving.energy,
        arriving_weighted=arriving.weighted, arriving_mass=arriving.mass, dw=dw, rho_sums=rho_sums,
    )  # fmt: skip


BACKEND = Backend(
    name="triton",
    serves=serves,
    saved_states=saved_states,
    starts_dtype=torch.float32,
    forward=forward,
    backward=backward,
)
