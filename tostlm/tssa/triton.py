"""Causal TSSA on NVIDIA GPUs: the backend over the kernels of `triton_forward` and `triton_backward`.

Shapes: B sequences, T tokens, C channels = H heads x D, N chunks. Importing this needs triton (`pip install
tostlm[triton]`). With TRITON_INTERPRET=1 it serves the CPU too, for tests: slow, but by the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tostlm.tssa import triton_backward, triton_forward
from tostlm.tssa.backend import Backend, Grads, Inputs, Saved
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


def chunk_starts(T: int) -> range:
    """First token of each chunk of T tokens."""
    return range(0, T, CHUNK)


def _device_of(w: Tensor) -> AbstractContextManager[None]:
    """Make w's GPU the current one, on which Triton launches."""
    manager: AbstractContextManager[None] = torch.cuda.device_of(w)
    return manager


def _warps(elements: int) -> int:
    """How many warps work on a tile."""
    return min(max(1, elements // TILE_PER_WARP), MAX_WARPS)


@dataclass(frozen=True)
class _Launch:
    """The inputs of both passes as the kernels read them, and how kernels are launched over them."""

    w: Tensor
    temp: Tensor
    rho: Tensor | None
    document_start: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs) -> _Launch:
        rho, mask = inputs.rho, inputs.document_start_mask
        return cls(
            inputs.w.contiguous(),
            inputs.temp.float().contiguous(),
            None if rho is None else rho.float().contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
        )

    @property
    def heads(self) -> int:
        return self.temp.shape[0]

    @property
    def head_width(self) -> int:
        return self.w.shape[2] // self.heads

    @property
    def chunks(self) -> int:
        return len(chunk_starts(self.w.shape[1]))

    @property
    def decays(self) -> bool:
        return self.rho is not None or self.document_start is not None

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
        decay = {"rho": self.rho, "document_start": self.document_start, "DECAYS": self.decays}
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


def forward(inputs: Inputs, state: State) -> tuple[Tensor, State, Saved]:
    """See `Backend`."""
    B, T, H, _ = inputs.sizes
    launch = _Launch.of(inputs)
    before = State(*(x.contiguous() for x in state))
    y, after = torch.empty_like(launch.w), State(*map(torch.empty_like, before))
    Pi, n = (launch.w.new_empty((B, T, H), dtype=torch.float32) for _ in range(2))
    result = y, after, Saved(Pi, n, launch.states())
    if B * T == 0:
        return y, State(*map(torch.clone, before)), result[2]
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    bias_stride = T * H if bias is not None and bias.dim() == 3 else 0
    with _device_of(inputs.w):
        (_forward_one_token if T == 1 else _forward_chunks)(launch, bias, bias_stride, before, *result)
    return result


def _forward_one_token(
    launch: _Launch, bias: Tensor | None, bias_stride: int, before: State, y: Tensor, after: State, saved: Saved
) -> None:
    H, D = launch.heads, launch.head_width
    HP, DP = triton.next_power_of_2(H), triton.next_power_of_2(D)
    triton_forward.one_token_kernel[(launch.w.shape[0],)](
        launch.w, launch.temp, bias, bias_stride, launch.rho, launch.document_start, *before, y, *after,
        saved.Pi, saved.n, *saved.chunk_states, H, HP, D, DP, num_warps=_warps(HP * DP),
    )  # fmt: skip


def _forward_chunks(
    launch: _Launch, bias: Tensor | None, bias_stride: int, before: State, y: Tensor, after: State, saved: Saved
) -> None:
    products = launch.per_head(torch.float64) if launch.decays else None
    chain = _Chain(launch.states(), saved.chunk_states, before, after, products, reverse=False)
    launch.over_heads(triton_forward.energy_sums_kernel, sums=chain.sums.energy, products=products)
    chain.carry_energy()
    launch.over_chunks(
        triton_forward.memberships_kernel, bias=bias, bias_stride=bias_stride,
        chunk_energy=saved.chunk_states.energy, Pi=saved.Pi, n=saved.n,
        sums_weighted=chain.sums.weighted, sums_mass=chain.sums.mass,
    )  # fmt: skip
    chain.carry_weighted_and_mass()
    _outputs(launch, saved, y)


def _outputs(launch: _Launch, saved: Saved, y: Tensor) -> None:
    states = saved.chunk_states
    launch.over_heads(
        triton_forward.outputs_kernel, y=y, Pi=saved.Pi, chunk_weighted=states.weighted, chunk_mass=states.mass
    )


def outputs(inputs: Inputs, saved: Saved) -> Tensor:
    """See `Backend`."""
    launch = _Launch.of(inputs)
    y = torch.empty_like(launch.w)
    if y.numel():
        with _device_of(inputs.w):
            _outputs(launch, saved, y)
    return y


def state_grads(inputs: Inputs, saved: Saved, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    B, T, H, D = inputs.sizes
    launch = _Launch.of(inputs)
    zeros, grads = (State.zeros(B, H * D, H, inputs.w.device) for _ in range(2))
    if B * T:
        with _device_of(inputs.w):
            _carry_state_grads(launch, saved, grad_y.contiguous(), zeros, grads)
    return grads.mass, grads.weighted


def _carry_state_grads(launch: _Launch, saved: Saved, grad_y: Tensor, after: State, before: State) -> _Chain:
    """Fill the mass and weighted sums' gradients before the first token, and return those that come into each chunk."""
    products = launch.per_head(torch.float64) if launch.decays else None
    chain = _Chain(launch.states(), launch.states(), after, before, products, reverse=True)
    launch.over_heads(
        triton_backward.gate_grad_sums_kernel, grad_y=grad_y, Pi=saved.Pi,
        chunk_weighted=saved.chunk_states.weighted, chunk_mass=saved.chunk_states.mass,
        sums_weighted=chain.sums.weighted, sums_mass=chain.sums.mass, products=products,
    )  # fmt: skip
    chain.carry_weighted_and_mass()
    return chain


def backward(inputs: Inputs, saved: Saved, grad_y: Tensor, grad_final_state: State, with_rho: bool) -> Grads:
    """See `Backend`."""
    B, T, H, _ = inputs.sizes
    launch = _Launch.of(inputs)
    after = State(*(x.contiguous() for x in grad_final_state))
    grad_w, grad_n = torch.empty_like(launch.w), torch.empty_like(saved.n)
    grad_temp, grad_rho = torch.zeros_like(launch.temp), torch.zeros_like(launch.temp)
    grads = Grads(grad_w, grad_temp, grad_n, grad_rho, State(*map(torch.empty_like, after)))
    if B * T == 0:
        return grads._replace(state=State(*map(torch.clone, after)))
    temp_sums, rho_sums = launch.per_head(), launch.per_head() if with_rho else None
    with _device_of(inputs.w):
        _backward_chunks(launch, saved, grad_y.contiguous(), after, grads, temp_sums, rho_sums)
    grads.temp.add_(temp_sums.sum((0, 1), dtype=torch.float64))
    if rho_sums is not None:
        assert launch.rho is not None
        total = rho_sums.sum((0, 1), dtype=torch.float64)
        for grad, states in zip(grads.state, saved.chunk_states, strict=True):  # the first token's share
            total += (grad * states[:, 0]).view(B, H, -1).sum((0, 2))
        grads.rho.add_(total / launch.rho)
    return grads


def _backward_chunks(
    launch: _Launch,
    saved: Saved,
    grad_y: Tensor,
    after: State,
    grads: Grads,
    temp_sums: Tensor,
    rho_sums: Tensor | None,
) -> None:
    """Fill the gradients, and the chunks' shares of temp's gradient and of rho times rho's."""
    chain = _carry_state_grads(launch, saved, grad_y, after, grads.state)
    incoming, states = chain.incoming, saved.chunk_states
    launch.over_chunks(
        triton_backward.membership_grads_kernel, grad_y=grad_y, Pi=saved.Pi, n=saved.n,
        chunk_energy=states.energy, chunk_weighted=states.weighted, chunk_mass=states.mass,
        incoming_weighted=incoming.weighted, incoming_mass=incoming.mass,
        grad_n=grads.n, temp_sums=temp_sums, sums_energy=chain.sums.energy,
    )  # fmt: skip
    chain.carry_energy()
    launch.over_heads(
        triton_backward.input_grads_kernel, grad_y=grad_y, Pi=saved.Pi, grad_n=grads.n,
        chunk_energy=states.energy, chunk_weighted=states.weighted, chunk_mass=states.mass,
        incoming_energy=incoming.energy, incoming_weighted=incoming.weighted, incoming_mass=incoming.mass,
        grad_w=grads.w, rho_sums=rho_sums,
    )  # fmt: skip


BACKEND = Backend("triton", serves, chunk_starts, torch.float32, forward, outputs, state_grads, backward)
