"""States one after the other, each made of the one before, as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from tostlm.chain.operator import chain as chain_operator
from tostlm.chain.operator import delta_chain as delta_chain_operator


def chain(added: Tensor, kept: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return S before each of the steps S <- kept S + added [B, N, H, D, V], and S after the last [B, H, D, V].

    Arguments as of `tostlm.chain.operator.chain`.
    """
    if not torch.compiler.is_exporting():
        states, last = chain_operator(added, kept, first)
        return states, last
    # An exported program has torch's own operators alone, step by step.
    found, state = [], first
    for n in range(added.shape[1]):
        found.append(state)
        state = kept[:, n] * state + added[:, n]
    return torch.stack(found, 1), state


def delta_chain(
    own: Tensor, reads: Tensor, ends: Tensor, kept: Tensor, added: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, S before each of the steps [B, N, H, D, V], and S after the last [B, H, D, V].

    A step is u = own + reads S, S <- kept S + ends u + added. Arguments as of `tostlm.chain.operator.delta_chain`.
    """
    if not torch.compiler.is_exporting():
        written, states, last = delta_chain_operator(own, reads, ends, kept, added, first)
        return written, states, last
    us, found, state = [], [], first
    for n in range(own.shape[1]):
        found.append(state)
        us.append(own[:, n] + reads[:, n] @ state)
        state = kept[:, n] * state + ends[:, n] @ us[-1]
        if added is not None:
            state = state + added[:, n]
    return torch.stack(us, 1), torch.stack(found, 1), state


__all__ = ["chain", "delta_chain"]
