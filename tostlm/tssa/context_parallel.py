"""The operator on sequences that the ranks of a process group share, each holding consecutive tokens.

All a rank needs of the ranks before it is what their tokens add to the running sums. The memberships need the energy
first, so there are two exchanges per layer and direction, of C + H and C + 2H numbers per sequence and rank, whatever
the number of tokens. A rank runs the operator once, as if nothing but energy came in before its tokens. What comes in
of the other two sums is then added to the chunk states, from which the outputs are computed; the backward pass mirrors
this.

Shapes: B sequences, T tokens of this rank, C channels = H heads x D, N chunks, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tostlm.autograd import first_order
from tostlm.parallel import all_gather
from tostlm.tssa.backend import Backend, Inputs, Saved
from tostlm.tssa.dispatch import choose
from tostlm.tssa.operator import input_grads
from tostlm.tssa.state import State

CHUNK = 256  # tokens summed in the compute dtype before float64 takes over


def context_parallel_operator(
    inputs: Inputs, before: State, group: dist.ProcessGroup, backend: str | None
) -> tuple[Tensor, State, Tensor]:
    """Return y and the memberships of this rank's tokens, and the state after the last rank's; every rank must call.

    The state `before` the first rank's tokens, temp and rho are the same on every rank of the `group`.

    Raises:
        ValueError: this rank is not in the group.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the group whose ranks share the sequence")
    B, _, H, D = inputs.sizes
    decays = inputs.decays(torch.float64)
    kept = before.mass.new_ones(B, H, 1) if decays is None else decays.prod(1)[..., None]  # of the sums coming in
    own = checkpoint(_sum_energy, inputs.w, decays, H, use_reentrant=False)
    energies = _chain(before.energy.view(B, H, D), all_gather(torch.cat([kept, own], -1), group))
    # Indexed out of one tensor, each rank's energy depends on every rank's: so every rank calls the backward pass of
    # the gather, the first rank too.
    energy, energy_after = energies[rank].flatten(1), energies[-1].flatten(1)
    chosen = choose(inputs.w, H, backend)
    y, *after, Pi = _Operator.apply(  # type: ignore[no-untyped-call]
        chosen, group, kept.detach(), energy_after, *inputs, energy, before.mass, before.weighted
    )
    return y, State(*after), Pi


class _Operator(torch.autograd.Function):
    """y, and the state after the last rank, once the energy before each rank is known.

    The energy after the last rank passes through, so that a loss of any of the results calls the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, group: dist.ProcessGroup, kept: Tensor, energy_after: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        inputs, before = Inputs(*tensors[:5]), State(*tensors[5:])
        zeros = before.energy, torch.zeros_like(before.mass), torch.zeros_like(before.weighted)
        _, own, saved = backend.forward(inputs, State(*zeros))
        summaries = all_gather(torch.cat([kept, _join(own.mass, own.weighted)], -1), group)
        sums = _chain(_join(before.mass, before.weighted), summaries)
        saved = _add_incoming(inputs, saved, sums[dist.get_rank(group)], backend)
        ctx.backend, ctx.group = backend, group
        ctx.save_for_backward(kept, *inputs, saved.Pi, saved.n, *saved.chunk_states)
        ctx.mark_non_differentiable(saved.Pi)
        return backend.outputs(inputs, saved), energy_after.clone(), *_split(sums[-1]), saved.Pi

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor, grad_energy: Tensor, *grad_sums: Tensor) -> tuple[Any, ...]:
        kept, *tensors = ctx.saved_tensors
        inputs, saved = Inputs(*tensors[:5]), Saved(tensors[5], tensors[6], State(*tensors[7:]))
        own = _join(*ctx.backend.state_grads(inputs, saved, grad_y))
        gathered = all_gather(torch.cat([kept, own, _join(*grad_sums[:2])], -1), ctx.group)
        summaries, final = gathered.tensor_split([1 + own.shape[-1]], -1)
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        incoming = _split(_chain(final.sum(0), summaries.flip(0))[ranks - 1 - rank])
        # The gradient that the energy brings from later ranks is autograd's: it goes through the gather of energies.
        grad_after = State(torch.zeros_like(incoming[1]), *incoming)
        needed = ctx.needs_input_grad[4:]
        grads = ctx.backend.backward(inputs, saved, grad_y, grad_after, inputs.rho is not None and needed[3])
        before = [grad if rank == 0 else torch.zeros_like(grad) for grad in grads.state[1:]]  # each counts once
        return None, None, None, grad_energy, *input_grads(grads, inputs, needed), grads.state.energy, *before


def _add_incoming(inputs: Inputs, saved: Saved, sums: Tensor, backend: Backend) -> Saved:
    """Add the sums before this rank's tokens, [B, H, D + 1], to the mass and weighted sums of every chunk state."""
    B, T, H, D = inputs.sizes
    starts = torch.tensor(backend.chunk_starts(T), dtype=torch.long, device=sums.device)
    decays = inputs.decays(torch.float64)
    incoming = sums[:, None].expand(B, len(starts), H, D + 1)
    if decays is not None:  # what the tokens before each chunk keep of it
        reach = torch.cat([torch.ones_like(decays[:, :1]), decays.cumprod(1)], 1)[:, starts]  # [B, N, H]
        incoming = incoming * reach[..., None]
    states = saved.chunk_states
    mass = (states.mass + incoming[..., -1]).to(states.mass.dtype)
    weighted = (states.weighted + incoming[..., :-1].flatten(2)).to(states.weighted.dtype)
    return saved._replace(chunk_states=State(states.energy, mass, weighted))


def _join(mass: Tensor, weighted: Tensor) -> Tensor:
    """Return the weighted sums and the mass of each head: [B, H, D + 1]."""
    B, H = mass.shape
    return torch.cat([weighted.view(B, H, weighted.shape[1] // H), mass[..., None]], -1)


def _split(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mass [B, H] and weighted sums [B, C] from what `_join` returned."""
    return sums[..., -1].contiguous(), sums[..., :-1].flatten(1)


def _chain(first: Tensor, summaries: Tensor) -> Tensor:
    """Return x [R + 1, B, H, K] before and after each of R steps x -> kept x + own, summaries [R, B, H, 1 + K]."""
    values = [first]
    for summary in summaries:
        values.append(summary[..., :1] * values[-1] + summary[..., 1:])
    return torch.stack(values)


def _sum_energy(w: Tensor, decays: Tensor | None, H: int) -> Tensor:
    """Return the energy of these tokens after the last of them, from zero: [B, H, D] float64."""
    B, _, C = w.shape
    remaining = None  # [B, T, H] in pieces, of each token after the last
    if decays is not None:
        last = torch.ones_like(decays[:, :1])
        remaining = torch.cat([decays[:, 1:].flip(1).cumprod(1).flip(1), last], 1).split(CHUNK, dim=1)
    compute = torch.promote_types(w.dtype, torch.float32)
    energy = torch.zeros(B, H, C // H, dtype=torch.float64, device=w.device)
    # split, unlike slices, has a backward pass that is linear in T
    for t, piece in enumerate(w.split(CHUNK, dim=1)):
        square = piece.to(compute).square().unflatten(-1, (H, C // H))
        if remaining is not None:
            square = square * remaining[t][..., None].to(compute)
        energy = energy + square.sum(1)
    return energy
