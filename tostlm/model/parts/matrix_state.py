"""Running sums of outer products, S_t = a_t S_{t-1} + k_t v_t^T, read as y_t = S_t^T q_t, in chunks of tokens.

Inside a chunk all pairs of tokens are one product of matrices; between chunks S alone is carried. So time and memory
are linear in the context. Numbers are fp32, or float64 where the inputs are.

Shapes: B sequences, T tokens, H heads, D channels of a head's keys, V of its values, N chunks of L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.positions import SequencePositions
from tostlm.parallel import all_gather

CHUNK = 64  # tokens


class ChunkDecays(NamedTuple):
    """What is left of a sum between tokens of a chunk: products of decays, 0 across the start of a document."""

    pairs: Tensor  # [B, N, H, L, L], from token j to token i at [i, j]; 0 above the diagonal
    from_start: Tensor  # [B, N, H, L], from what comes into the chunk to token i, its own decay included
    to_end: Tensor  # [B, N, H, L], from token j to the end of the chunk
    whole: Tensor  # [B, N, H], from what comes into the chunk to its end

    @classmethod
    def build(cls, log_decays: Tensor, positions: SequencePositions, B: int, T: int) -> ChunkDecays:
        """Build them from log_decays [B, T, H] or [1, 1, H], as `Forgetting` has them."""
        L = min(CHUNK, max(T, 1))
        padding = -T % L
        # What pads the last chunk neither decays nor adds anything.
        logs = F.pad(log_decays.expand(B, T, -1), (0, 0, 0, padding)).unflatten(1, (-1, L)).transpose(2, 3)
        sums = logs.cumsum(-1)  # [B, N, H, L]
        causal = torch.ones(L, L, dtype=torch.bool, device=sums.device).tril()
        pairs = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        from_start, to_end, whole = sums.exp(), (sums[..., -1:] - sums).exp(), sums[..., -1].exp()
        if positions.document_start_mask is not None:
            starts = F.pad(positions.document_start_mask, (0, padding)).unflatten(1, (-1, L))
            count = starts.cumsum(-1)[:, :, None]  # [B, N, 1, L], documents that have started in the chunk
            pairs = pairs * (count[..., :, None] == count[..., None, :])
            from_start, to_end = from_start * (count == 0), to_end * (count == count[..., -1:])
            whole = whole * (count[..., -1] == 0)
        return cls(pairs, from_start, to_end, whole)


def sum_outer_products(
    q: Tensor, k: Tensor, v: Tensor, log_decays: Tensor, positions: SequencePositions, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, H, V], and S [B, H, D, V] after the last token of all ranks that share the context.

    Args:
        q, k: [B, T, H, D], queries and keys.
        v: [B, T, H, V], values.
        log_decays: [B, T, H] or [1, 1, H], logs of a_t. A document's first token forgets everything before it.
        state: [B, H, D, V], S before the first token of the context's call; None is 0.
    """
    (B, T, H, D), V = k.shape, v.shape[-1]
    if state is None:
        state = k.new_zeros(B, H, D, V)
    decays = ChunkDecays.build(log_decays, positions, B, T)
    q, k, v = (_chunked(x, decays.pairs.shape[-1]) for x in (q, k, v))  # [B, N, H, L, D]
    added = (k * decays.to_end[..., None]).transpose(-1, -2) @ v  # [B, N, H, D, V], by each chunk
    carried, last = _carry(added, decays.whole, state, positions.group)
    y = (q @ k.transpose(-1, -2) * decays.pairs) @ v + (q * decays.from_start[..., None]) @ carried
    return y.transpose(2, 3).flatten(1, 2)[:, :T], last


def _chunked(x: Tensor, L: int) -> Tensor:
    """[B, T, H, D] -> [B, N, H, L, D], the last chunk padded with zeros."""
    chunked: Tensor = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % L)).unflatten(1, (-1, L)).transpose(2, 3)
    return chunked


def _carry(added: Tensor, whole: Tensor, state: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return S before each of this rank's chunks [B, N, H, D, V], and S after the last rank's last [B, H, D, V]."""
    sums = [state if group is None else torch.zeros_like(state)]
    for n in range(added.shape[1]):
        sums.append(whole[:, n, :, None, None] * sums[-1] + added[:, n])
    carried = torch.stack(sums, 1)  # [B, N + 1, H, D, V]
    if group is None:
        return carried[:, :-1], sums[-1]
    reach = torch.cat([torch.ones_like(whole[:, :1]), whole.cumprod(1)], 1)[..., None, None]  # of what came in
    ranks = all_gather(torch.cat([reach[:, -1].flatten(2), carried[:, -1].flatten(2)], -1), group)
    ends = [state]
    for rank in ranks:
        ends.append(rank[..., :1, None] * ends[-1] + rank[..., 1:].unflatten(-1, state.shape[-2:]))
    # Indexed out of one tensor, each rank's sum depends on every rank's: so every rank calls the backward pass of the
    # gather, the first rank too.
    everywhere = torch.stack(ends)
    return (carried + reach * everywhere[group.rank()][:, None])[:, :-1], everywhere[-1].clone()
