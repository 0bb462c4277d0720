"""States one after the other, each made of the one before, as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from tostlm.chain.operator import chain as chain_operator
from tostlm.chain.operator import delta_chain as delta_chain_operator
from tostlm.chain.operator import step_order

__all__ = ["chain", "delta_chain"]


def chain(added: Tensor, kept: Tensor, first: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """Return S before each of the steps S <- kept S + added [B, N, H, D, V], and S after the last [B, H, D, V].

    Arguments as of `tostlm.chain.operator.chain`. In a program that is exported, of torch's own operators alone.
    """
    if not torch.compiler.is_exporting():
        states, last = chain_operator(added, kept, first, back)
        return states, last
    found, state = {}, first
    for n in step_order(added, back):
        found[n] = state
        state = kept[:, n] * state + added[:, n]
    return _stacked(found), state


def delta_chain(
    own: Tensor, reads: Tensor, ends: Tensor, kept: Tensor, added: Tensor | None, first: Tensor, back: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, S before each of the steps [B, N, H, D, V], and S after the last [B, H, D, V].

    A step is u = own + reads S, S <- kept S + ends u + added. Arguments as of `tostlm.chain.operator.delta_chain`; in a
    program that is exported, of torch's own operators alone.
    """
    if not torch.compiler.is_exporting():
        written, states, last = delta_chain_operator(own, reads, ends, kept, added, first, back)
        return written, states, last
    us, found, state = {}, {}, first
    for n in step_order(own, back):
        found[n], us[n] = state, own[:, n] + reads[:, n] @ state
        state = kept[:, n] * state + ends[:, n] @ us[n]
        if added is not None:
            state = state + added[:, n]
    return _stacked(us), _stacked(found), state


def _stacked(by_step: dict[int, Tensor]) -> Tensor:
    return torch.stack([by_step[n] for n in sorted(by_step)], 1)
