"""Causal TSSA of one sequence split over the ranks of a process group, each holding consecutive tokens.

All a rank needs of those to its left is what they add to the running sums. The memberships need the energy first, so
there are two exchanges a layer and direction, of C + H and C + 2H numbers a sequence and rank, whatever the number of
tokens. Shapes: B sequences, T tokens of this rank, C channels = H heads x D, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tostlm.parallel import all_gather
from tostlm.tssa import State, tssa
from tostlm.tssa.chunked import decays

CHUNK = 64  # tokens summed in the compute dtype before float64 takes over


def tssa_over_ranks(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None = None,
    rho: Tensor | None = None,
    reset: Tensor | None = None,
    state: State | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, State]:
    """`tostlm.tssa.tssa` of the ranks' pieces laid end to end, in the group's order; every rank must call.

    Args:
        w, bias, reset: of this rank's T tokens; ranks may hold different T, none empty.
        temp, rho, state: the same on every rank; `state` is the one before the first rank's tokens.
        group: the process group the sequence is split over.

    Returns:
        y of this rank's tokens, and on every rank the state after the last rank's. Gradients are this rank's share:
        summed over the group they are those of the whole.
    """
    B, T, C = w.shape
    H = temp.shape[0]
    zeros = State.zeros(B, C, H, w.device)
    before = zeros if state is None else state
    decay = decays(rho, reset, B, T, H, torch.float64)
    if decay is None:
        decay = torch.ones(B, T, H, dtype=torch.float64, device=w.device)
    kept = decay.prod(1)[..., None]  # [B, H, 1], what these tokens leave of the sums that come in

    local = checkpoint(_local_energy, w, decay, use_reentrant=False)
    energy_in, energy_out = _prefix(kept, local, before.energy.view(B, H, -1), group)
    energy = energy_in.reshape(B, C)

    _, own = tssa(w, temp, bias, rho, reset, State(energy, zeros.mass, zeros.weighted))
    sums_in, sums_out = _prefix(kept, _joined(own), _joined(before), group)
    y, _ = tssa(w, temp, bias, rho, reset, State(energy, *_split(sums_in)))
    return y, State(energy_out.reshape(B, C), *_split(sums_out))


def _joined(state: State) -> Tensor:
    """Weighted sums and mass of each head: [B, H, D + 1]."""
    B, H = state.mass.shape
    return torch.cat([state.weighted.view(B, H, -1), state.mass[..., None]], -1)


def _split(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mass [B, H] and weighted [B, C] of what `_joined` made."""
    return sums[..., -1], sums[..., :-1].flatten(1)


def _local_energy(w: Tensor, decay: Tensor) -> Tensor:
    """Energy of these tokens after the last of them, from zero: [B, H, D] float64."""
    B, T, C = w.shape
    H = decay.shape[-1]
    compute = torch.promote_types(w.dtype, torch.float32)
    left = torch.ones_like(decay)  # what is left of each token at the end
    left[:, :-1] = decay[:, 1:].flip(1).cumprod(1).flip(1)
    energy = torch.zeros(B, H, C // H, dtype=torch.float64, device=w.device)
    for t in range(0, T, CHUNK):
        square = w[:, t : t + CHUNK].to(compute).square().view(B, -1, H, C // H)
        energy = energy + (square * left[:, t : t + CHUNK, :, None].to(compute)).sum(1)
    return energy


def _prefix(kept: Tensor, local: Tensor, before: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """What comes in to this rank, and what leaves the last one, of x -> kept x + local composed rank by rank.

    kept [B, H, 1]; local, before and both results [B, H, K].
    """
    sums = [before]
    for summary in all_gather(torch.cat([kept, local], -1), group):  # [B, H, 1 + K]
        sums.append(summary[..., :1] * sums[-1] + summary[..., 1:])
    # Taken out of the stack, what comes in depends on every rank, if only by zeros: every rank then calls the gather's
    # backward, the first one too, which nothing comes in to.
    stacked = torch.stack(sums)
    return stacked[dist.get_rank(group)], stacked[-1]
