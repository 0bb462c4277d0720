"""Causal TSSA on NVIDIA GPUs: the backend over the kernels of `triton_forward` and `triton_backward`.

Shapes: B sequences, T tokens, C channels = H heads x D, N chunks. Importing this needs triton (`pip install
tostlm[triton]`). With TRITON_INTERPRET=1 it serves the CPU too, for tests: slow, but by the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tostlm.tssa import triton_backward, triton_forward
from tostlm.tssa.backend import Backend, Grads, Inputs, Saved, empty_chunk_states, empty_per_head
from tostlm.tssa.state import State

CHUNK = 32  # tokens; the tiles of 64 do not fit the registers of the backward pass
CARRY_CHANNELS = 16  # of one program that chains chunks: few, as it goes along the whole sequence,
CARRY_CHUNKS = 64  # this many chunks at a time
TILE_PER_WARP = 256  # elements, 8 a thread
MAX_WARPS = 16
# Of a thread, at most: so many warps are on a multiprocessor that some compute while others wait for memory. Two of the
# backward pass's kernels hold more tiles at once. Without a limit the compiler takes up to 158, for 8 warps.
REGISTERS, MORE_REGISTERS = 64, 128  # for 32 warps, and for 16
HEADS_FIRST = True  # see `triton_forward`
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_WIDTHS = range(16, 257)


def serves(device: str, dtype: torch.dtype, head_width: int) -> bool:
    """See `Backend`."""
    reachable = device == "cuda" or (device == "cpu" and triton.knobs.runtime.interpret)
    return reachable and dtype in DTYPES and head_width in HEAD_WIDTHS


def _warps(elements: int) -> int:
    """How many warps work on a tile."""
    return min(max(1, elements // TILE_PER_WARP), MAX_WARPS)


class _Launcher:
    """The inputs of a pass as the kernels read them, and how kernels are launched over them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs.dense()
        self.B, T, self.H, self.D = inputs.sizes
        self.N = triton.cdiv(T, CHUNK)
        self.HP, self.DP = triton.next_power_of_2(self.H), triton.next_power_of_2(self.D)
        w, _, _, rho, mask = self.inputs
        decays = rho is not None or mask is not None
        self.document_start = None if mask is None else mask.view(torch.uint8)
        # [B, N, H], of each chunk's decays
        self.products = empty_per_head(self.inputs, self.N, torch.float64, HEADS_FIRST) if decays else None
        sizes = {"T": T, "N": self.N, "H": self.H, "D": self.D, "DP": self.DP, "L": CHUNK}
        decay = {"rho": rho, "document_start": self.document_start, "DECAYS": decays}
        warps = _warps(CHUNK * self.DP)
        self._wide = warps * TILE_PER_WARP < CHUNK * self.DP
        self._shared = {"w": w, **sizes, **decay, "num_warps": warps}

    def states(self) -> State:
        """An empty state a chunk."""
        return empty_chunk_states(self.inputs, self.N, torch.float32, HEADS_FIRST)

    def over_heads(self, kernel: Any, registers: int = REGISTERS, **own: Tensor | None) -> None:
        """Launch a program for each chunk and head."""
        self._over(kernel, self.B * self.N * self.H, registers, own)

    def over_chunks(self, kernel: Any, registers: int = REGISTERS, **own: Tensor | int | None) -> None:
        """Launch a program for each chunk."""
        self._over(kernel, self.B * self.N, registers, {**own, "temp": self.inputs.temp, "HP": self.HP})

    def _over(self, kernel: Any, programs: int, registers: int, own: dict[str, Any]) -> None:
        registers = MORE_REGISTERS if self._wide else registers  # as a thread has more of the tiles
        self.launch(kernel, (programs,), **self._shared, **own, maxnreg=registers)

    def carry(self, channels: Sequence[Tensor], mass: Sequence[Tensor | None] = (None,) * 4, *, reverse: bool) -> None:
        """Chain the chunks of a scan: sums, incoming, first and last of its channels, and of its mass if it has one."""
        programs = triton.cdiv(self.D, CARRY_CHANNELS) + (mass[0] is not None)
        self.launch(
            triton_forward.carry_kernel, (self.B * self.H, programs), *channels, *mass, self.products,
            self.N, self.H, self.D, WIDTH=CARRY_CHANNELS, STEP=CARRY_CHUNKS,
            DECAYS=self.products is not None, REVERSE=reverse, num_warps=4,
        )  # fmt: skip

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        """Launch a kernel on the GPU of the inputs."""
        with torch.cuda.device_of(self.inputs.w):
            kernel[grid](*arguments, **named)


def forward(inputs: Inputs, state: State) -> tuple[Tensor, State, Saved]:
    """See `Backend`."""
    B, T, H, D = inputs.sizes
    launcher = _Launcher(inputs)
    w, temp, bias, rho, _ = launcher.inputs
    bias_stride, HP, DP = launcher.inputs.bias_stride, launcher.HP, launcher.DP
    before = State(*(x.contiguous() for x in state))
    y, after = torch.empty_like(w), State(*map(torch.empty_like, before))
    saved = Saved.empty(inputs, launcher.N, BACKEND.saved_dtype, HEADS_FIRST)
    if B * T == 0:
        return y, State(*map(torch.clone, before)), saved
    if T == 1:
        launcher.launch(
            triton_forward.one_token_kernel, (B,), w, temp, bias, bias_stride, rho, launcher.document_start,
            *before, y, *after, saved.Pi, saved.n, *saved.chunk_states, H, HP, D, DP, num_warps=_warps(HP * DP),
        )  # fmt: skip
        return y, after, saved
    chain = sums, states, _, _ = launcher.states(), saved.chunk_states, before, after
    launcher.over_heads(triton_forward.energy_sums_kernel, sums=sums.energy, products=launcher.products)
    launcher.carry([x.energy for x in chain], reverse=False)
    launcher.over_chunks(
        triton_forward.memberships_kernel, bias=bias, bias_stride=bias_stride, chunk_energy=states.energy,
        Pi=saved.Pi, n=saved.n, sums_weighted=sums.weighted, sums_mass=sums.mass,
    )  # fmt: skip
    launcher.carry([x.weighted for x in chain], [x.mass for x in chain], reverse=False)
    _outputs(launcher, saved, y)
    return y, after, saved


def _outputs(launcher: _Launcher, saved: Saved, y: Tensor) -> None:
    states = saved.chunk_states
    launcher.over_heads(
        triton_forward.outputs_kernel, y=y, Pi=saved.Pi, chunk_weighted=states.weighted, chunk_mass=states.mass
    )


def _as_kernels_read(saved: Saved) -> Saved:
    """The same numbers with the heads first in memory; a caller may have changed what `forward` returned."""
    (Pi, n, (energy, mass, weighted)) = saved
    Pi, n, mass = (x.mT.contiguous().mT for x in (Pi, n, mass))
    return Saved(Pi, n, State(energy.contiguous(), mass, weighted.contiguous()))


def outputs(inputs: Inputs, saved: Saved) -> Tensor:
    """See `Backend`."""
    launcher, saved = _Launcher(inputs), _as_kernels_read(saved)
    y = torch.empty_like(launcher.inputs.w)
    if y.numel():
        _outputs(launcher, saved, y)
    return y


def state_grads(inputs: Inputs, saved: Saved, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    B, T, H, D = inputs.sizes
    zeros, grads = (State.zeros(B, H * D, H, inputs.w.device) for _ in range(2))
    if B * T:
        _carry_state_grads(_Launcher(inputs), _as_kernels_read(saved), grad_y.contiguous(), zeros, grads)
    return grads.mass, grads.weighted


def _carry_state_grads(
    launcher: _Launcher, saved: Saved, grad_y: Tensor, after: State, before: State
) -> tuple[State, ...]:
    """Fill the mass and weighted sums' gradients before the first token, and return what `_Launcher.carry` chained."""
    chain = sums, _, _, _ = launcher.states(), launcher.states(), after, before
    launcher.over_heads(
        triton_backward.gate_grad_sums_kernel, grad_y=grad_y, Pi=saved.Pi,
        chunk_weighted=saved.chunk_states.weighted, chunk_mass=saved.chunk_states.mass,
        sums_weighted=sums.weighted, sums_mass=sums.mass, products=launcher.products,
    )  # fmt: skip
    launcher.carry([x.weighted for x in chain], [x.mass for x in chain], reverse=True)
    return chain


def backward(inputs: Inputs, saved: Saved, grad_y: Tensor, grad_final_state: State, with_rho: bool) -> Grads:
    """See `Backend`."""
    B, T, H, _ = inputs.sizes
    launcher, saved = _Launcher(inputs), _as_kernels_read(saved)
    after = State(*(x.contiguous() for x in grad_final_state))
    grad_w, grad_n = torch.empty_like(launcher.inputs.w), torch.empty_like(saved.n)
    if B * T == 0:
        grad_temp, grad_rho = (torch.zeros_like(launcher.inputs.temp) for _ in range(2))
        return Grads(grad_w, grad_temp, grad_n, grad_rho, State(*map(torch.clone, after)))
    grad_y, states = grad_y.contiguous(), saved.chunk_states
    temp_sums, rho_sums = (launcher.inputs.w.new_empty((B, launcher.N, H), dtype=torch.float32) for _ in range(2))
    chain = _carry_state_grads(launcher, saved, grad_y, after, State(*map(torch.empty_like, after)))
    sums, incoming, _, initial = chain
    launcher.over_chunks(
        triton_backward.membership_grads_kernel, MORE_REGISTERS, grad_y=grad_y, Pi=saved.Pi, n=saved.n,
        chunk_energy=states.energy, chunk_weighted=states.weighted, chunk_mass=states.mass,
        incoming_weighted=incoming.weighted, incoming_mass=incoming.mass,
        grad_n=grad_n, temp_sums=temp_sums, sums_energy=sums.energy,
    )  # fmt: skip
    launcher.carry([x.energy for x in chain], reverse=True)
    launcher.over_heads(
        triton_backward.input_grads_kernel, MORE_REGISTERS, grad_y=grad_y, Pi=saved.Pi, grad_n=grad_n,
        chunk_energy=states.energy, chunk_weighted=states.weighted, chunk_mass=states.mass,
        incoming_energy=incoming.energy, incoming_weighted=incoming.weighted, incoming_mass=incoming.mass,
        grad_w=grad_w, rho_sums=rho_sums if with_rho else None,
    )  # fmt: skip
    grad_temp = temp_sums.sum((0, 1), dtype=torch.float64).float()
    grad_rho = _grad_rho(launcher, rho_sums, initial, states) if with_rho else torch.empty_like(grad_temp)
    return Grads(grad_w, grad_temp, grad_n, grad_rho, initial)


def _grad_rho(launcher: _Launcher, sums: Tensor, initial: State, chunk_states: State) -> Tensor:
    """The gradient [H] of rho, from each chunk's share of rho times it, and the gradients of the initial state."""
    assert launcher.inputs.rho is not None
    total = sums.sum((0, 1), dtype=torch.float64)
    for grad, starts in zip(initial, chunk_states, strict=True):  # the first token's share
        total += (grad * starts[:, 0]).view(launcher.B, launcher.H, -1).sum((0, 2))
    return (total / launcher.inputs.rho).float()


BACKEND = Backend(
    "triton", serves, lambda T: range(0, T, CHUNK), torch.float32, HEADS_FIRST, forward, outputs, state_grads, backward
)
