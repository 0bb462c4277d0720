"""What a backend of the operator computes, and the named tuples it computes with.

Shapes: B sequences, T tokens, C channels = H heads x D, N chunks of tokens, as each backend cuts them. The compute
dtype is fp64 for fp64 inputs and fp32 for narrower ones; states are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.tssa.state import State


class Inputs(NamedTuple):
    """The operator's inputs beside the state."""

    w: Tensor  # [B, T, C]
    temp: Tensor  # [H]
    bias: Tensor | None = None  # [T, H] or [B, T, H]
    rho: Tensor | None = None  # [H]
    document_start_mask: Tensor | None = None  # [B, T] bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, H and D."""
        B, T, C = self.w.shape
        H = self.temp.shape[0]
        return B, T, H, C // H

    def decays(self, dtype: torch.dtype) -> Tensor | None:
        """Return the factor of the running sums before each token, [B, T, H]; None where it is 1 everywhere."""
        if self.rho is None and self.document_start_mask is None:
            return None
        B, T, H, _ = self.sizes
        decays = torch.ones(H, dtype=dtype, device=self.w.device) if self.rho is None else self.rho.to(dtype)
        decays = decays.expand(B, T, H)
        mask = self.document_start_mask
        return decays if mask is None else decays.masked_fill(mask[..., None], 0.0)

    def dense(self) -> Inputs:
        """Return what compiled kernels read: the same numbers, contiguous, and all but w and the mask in fp32."""
        w, temp, bias, rho, mask = self
        bias, rho = (None if x is None else x.float().contiguous() for x in (bias, rho))
        return Inputs(w.contiguous(), temp.float().contiguous(), bias, rho, None if mask is None else mask.contiguous())

    @property
    def bias_stride(self) -> int:
        """How far the biases of two sequences are apart where they are dense; 0 where all sequences have one."""
        _, T, H, _ = self.sizes
        return T * H if self.bias is not None and self.bias.dim() == 3 else 0


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass beside the inputs."""

    Pi: Tensor  # [B, T, H] in the compute dtype, the memberships
    n: Tensor  # [B, T, H], what temp multiplies
    chunk_states: State  # [B, N, ...], the state before each chunk, in the backend's `saved_dtype`

    @classmethod
    def empty(cls, inputs: Inputs, chunks: int, saved_dtype: torch.dtype, heads_first: bool) -> Saved:
        """Return memory for what a forward pass saves of N chunks; `saved_dtype` and `heads_first` as in `Backend`."""
        compute, saved = (torch.promote_types(inputs.w.dtype, dtype) for dtype in (torch.float32, saved_dtype))
        Pi, n = (empty_per_head(inputs, inputs.sizes[1], compute, heads_first) for _ in range(2))
        return cls(Pi, n, empty_chunk_states(inputs, chunks, saved, heads_first))


def empty_chunk_states(inputs: Inputs, chunks: int, dtype: torch.dtype, heads_first: bool) -> State:
    """Return memory for a state for each of N chunks, [B, N, C] and [B, N, H]."""
    B, _, C = inputs.w.shape
    energy, weighted = (inputs.w.new_empty((B, chunks, C), dtype=dtype) for _ in range(2))
    return State(energy, empty_per_head(inputs, chunks, dtype, heads_first), weighted)


def empty_per_head(inputs: Inputs, length: int, dtype: torch.dtype, heads_first: bool) -> Tensor:
    """Return an empty [B, length, H], which in memory is [B, H, length] if `heads_first`."""
    B, _, H, _ = inputs.sizes
    if heads_first:
        return inputs.w.new_empty((B, H, length), dtype=dtype).mT
    return inputs.w.new_empty((B, length, H), dtype=dtype)


class Grads(NamedTuple):
    """Gradients of the inputs and of the initial state. The bias's is D times that of n."""

    w: Tensor  # [B, T, C] in w's dtype
    temp: Tensor  # [H] in the compute dtype
    n: Tensor  # [B, T, H]
    rho: Tensor  # [H], meaningless unless it was asked for
    state: State


class Backend(NamedTuple):
    """One implementation of the operator. No result may share memory with an argument.

    Attributes:
        name: by which `backend=` and the environment choose it.
        serves: whether it serves a device type, a dtype of w and a head width D.
        chunk_starts: the first token of each of the N chunks of T tokens.
        saved_dtype: dtype of the saved chunk states, for inputs narrower than fp64.
        heads_first: whether in memory the heads of Pi, n and the chunks' mass come before their tokens or chunks.
        forward: inputs and the initial state -> y [B, T, C] in w's dtype, the final state, and what is saved.
        outputs: y again, from the inputs and what is saved.
        state_grads: inputs, what is saved and grad_y -> the gradients of the initial `mass` [B, H] and `weighted`
            [B, C] in float64 that y causes. The initial energy acts through Pi alone, which is held fixed.
        backward: inputs, what is saved, grad_y, grad_final_state, whether rho's gradient is wanted -> all gradients.
    """

    name: str
    serves: Callable[[str, torch.dtype, int], bool]
    chunk_starts: Callable[[int], range | list[int]]
    saved_dtype: torch.dtype
    heads_first: bool
    forward: Callable[[Inputs, State], tuple[Tensor, State, Saved]]
    outputs: Callable[[Inputs, Saved], Tensor]
    state_grads: Callable[[Inputs, Saved, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Inputs, Saved, Tensor, State, bool], Grads]
