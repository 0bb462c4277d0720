"""A matrix of memory in each head, read as y_t = S_t^T q_t, in chunks of tokens.

It is written by adding, S_t = a_t S_{t-1} + k_t v_t^T, or by the gated delta rule, which first takes out what it would
read at the key: S_t = a_t S_{t-1} + b_t k~_t (v_t - a_t S_{t-1}^T k_t)^T.

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

from tostlm.chain import chain, delta_chain
from tostlm.model.parts.triangular import solve_unit_lower
from tostlm.model.positions import SequencePositions
from tostlm.parallel import all_gather

CHUNK = 64  # tokens, where each chunk costs launches of kernels
CPU_CHUNK = 32  # where smaller products cost less


class ChunkDecays(NamedTuple):
    """What is left of a sum between tokens of a chunk: products of decays, 0 across the start of a document."""

    pairs: Tensor  # [B, N, H, L, L], from token j to token i at [i, j]; 0 above the diagonal
    from_start: Tensor  # [B, N, H, L], from what comes into the chunk to token i, its own decay included
    to_end: Tensor  # [B, N, H, L], from token j to the end of the chunk
    whole: Tensor  # [B, N, H], from what comes into the chunk to its end

    @property
    def length(self) -> int:
        """Tokens L of a chunk."""
        return self.pairs.shape[-1]

    @classmethod
    def build(cls, log_decays: Tensor, positions: SequencePositions, B: int, T: int) -> ChunkDecays:
        """Build them from log_decays [B, T, H] or [1, 1, H], logs of a_t as `Forgetting` has them.

        A document's first token forgets everything before it.
        """
        L = min(chunk_tokens(log_decays.device), max(T, 1))
        padding = -T % L
        # What pads the last chunk neither decays nor adds anything.
        logs = F.pad(log_decays.expand(B, T, -1), (0, 0, 0, padding)).unflatten(1, (-1, L)).transpose(2, 3)
        sums = logs.cumsum(-1)  # [B, N, H, L]
        causal = torch.ones(L, L, dtype=torch.bool, device=sums.device).tril()
        pairs = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        from_start, to_end, whole = sums.exp(), (sums[..., -1:] - sums).exp(), sums[..., -1].exp()
        count = documents_in_chunks(positions, L)
        if count is not None:
            pairs = pairs * (count[..., :, None] == count[..., None, :])
            from_start, to_end = from_start * (count == 0), to_end * (count == count[..., -1:])
            whole = whole * (count[..., -1] == 0)
        return cls(pairs, from_start, to_end, whole)


def chunk_tokens(device: torch.device) -> int:
    """Return how many tokens a chunk has at most on a device, a power of two."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def documents_in_chunks(positions: SequencePositions, L: int) -> Tensor | None:
    """Return how many documents have started in each chunk up to each token [B, N, 1, L]; None where none start."""
    mask = positions.document_start_mask
    if mask is None:
        return None
    count: Tensor = F.pad(mask, (0, -mask.shape[1] % L)).unflatten(1, (-1, L)).cumsum(-1)[:, :, None]
    return count


def add_outer_products(
    q: Tensor, k: Tensor, v: Tensor, decays: ChunkDecays, positions: SequencePositions, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, H, V] of S_t = a_t S_{t-1} + k_t v_t^T, and S [B, H, D, V] after the last token of all ranks.

    Args:
        q, k: [B, T, H, D], queries and keys, or [B, T, 1, D], those of all heads.
        v: [B, T, H, V], values.
        decays: of a_t, as `ChunkDecays.build` makes them for these tokens.
        state: [B, H, D, V], S before the first token of the call.
    """
    T = v.shape[1]
    q, k, v = (chunked(x, decays.length) for x in (q, k, v))  # [B, N, H, L, D]
    added = (k * decays.to_end[..., None]).transpose(-1, -2) @ v  # [B, N, H, D, V], by each chunk
    carried, last = carry(added, decays.whole[..., None, None], state, positions.group)
    y = (q @ k.transpose(-1, -2) * decays.pairs) @ v + (q * decays.from_start[..., None]) @ carried
    return y.transpose(2, 3).flatten(1, 2)[:, :T], last


def outer_products_flops(C: int, H: int, context: int, scored_heads: int | None = None) -> float:
    """Return the floating-point operations of `add_outer_products` per token, C = H D = H V, over `context` tokens.

    `scored_heads` have keys and queries of their own: all where it is None, or 1.
    """
    D = C // H
    # Half a chunk's pairs on average: their scores, and values. Then the state's update and its reading.
    return 2.0 * ((scored_heads or H) * D + C) * min(CHUNK, context) / 2 + 2.0 * C * 2 * D


def delta_rule(
    q: Tensor,
    k: Tensor,
    written_keys: Tensor,
    v: Tensor,
    strengths: Tensor,
    decays: ChunkDecays,
    positions: SequencePositions,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, H, V] of S_t = a_t S_{t-1} + b_t k~_t (v_t - a_t S_{t-1}^T k_t)^T, and the last S [B, H, D, V].

    What is written at the tokens of a chunk, u, solves (1 + M) u = b (v - S^T k), M of its pairs: the WY form of
    products of Householder-like matrices. So a chunk needs of the S before it one product each way.

    Args:
        written_keys: [B, T, H, D], the keys k~ under which values are written.
        strengths: [B, T, H], b. The others as in `add_outer_products`.

    Source: Gated DeltaNet (arXiv 2412.06464) and its chunks in DeltaNet (arXiv 2406.06484).
    """
    (T, _, D), V = k.shape[1:], v.shape[-1]
    q, k, written_keys, v = (chunked(x, decays.length) for x in (q, k, written_keys, v))  # [B, N, H, L, D]
    b = chunked(strengths[..., None], decays.length)
    M = (b * decays.pairs * (k @ written_keys.transpose(-1, -2))).tril(-1)  # [B, N, H, L, L]
    right = torch.cat([b * v, -b * decays.from_start[..., None] * k], -1)  # [B, N, H, L, V + D]
    solved = solve_unit_lower(M, right)
    own, reads = solved.split([V, D], -1)
    ends = (written_keys * decays.to_end[..., None]).mT  # [B, N, H, D, L]
    u, carried, last = delta_carry(own, reads, ends, decays.whole[..., None, None], None, state, positions.group)
    y = (q @ written_keys.mT * decays.pairs) @ u + (q * decays.from_start[..., None]) @ carried
    return y.transpose(2, 3).flatten(1, 2)[:, :T], last


def delta_rule_flops(H: int, D: int, V: int, context: int) -> float:
    """Return the floating-point operations of `delta_rule` per token, of H heads, over `context` tokens."""
    # Half a chunk's pairs on average: keys' and queries' scores, what is solved, its reading. Then what is taken from
    # the state, the state's update and its reading.
    return H * (2.0 * min(CHUNK, context) / 2 * (2 * D + (V + D) + V) + 2.0 * 3 * D * V)


def chunked(x: Tensor, L: int) -> Tensor:
    """[B, T, H, D] -> [B, N, H, L, D], the last chunk padded with zeros."""
    chunks: Tensor = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % L)).unflatten(1, (-1, L)).transpose(2, 3)
    return chunks


def carry(added: Tensor, kept: Tensor, state: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return S before each of this rank's chunks [B, N, H, D, V], and S after the last rank's last [B, H, D, V].

    A chunk makes S to kept S + added. Shapes as in `chain`, but of this rank's chunks, and `state` is S before the
    first rank's.
    """
    if group is None:
        states, last = chain(added, kept, state)
        return states, last
    # What a rank's chunks make of S has the same form: they are run from S = 0, and from what keeps S beside it.
    own, own_last = chain(added, kept, torch.zeros_like(state))
    reach, whole_reach = chain(torch.zeros_like(kept), kept, kept.new_ones(kept[:, 0].shape))
    start, last = _across_ranks(whole_reach, own_last, state, group)
    return own + reach * start[:, None], last


def delta_carry(
    own: Tensor,
    reads: Tensor,
    ends: Tensor,
    kept: Tensor,
    added: Tensor | None,
    state: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u [B, N, H, L, V] and S before each of this rank's chunks, and S after the last rank's last.

    A chunk writes u = own + reads S, and makes S to kept S + ends u + added. Shapes as in `delta_chain`, but of this
    rank's chunks, and `state` is S before the first rank's.
    """
    if group is None:
        u, states, last = delta_chain(own, reads, ends, kept, added, state)
        return u, states, last
    D = state.shape[-2]
    identity = torch.eye(D, dtype=state.dtype, device=state.device).expand(*state.shape[:2], D, D)
    u, states, own_last = delta_chain(own, reads, ends, kept, added, torch.zeros_like(state))
    reached, reach, whole_reach = delta_chain(torch.zeros_like(reads), reads, ends, kept, None, identity)
    start, last = _across_ranks(whole_reach, own_last, state, group)
    start = start[:, None]
    return u + reached @ start, states + reach @ start, last


def _across_ranks(reach: Tensor, added: Tensor, state: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return S before this rank's tokens and after the last rank's, each [B, H, D, V], of S before the first rank's.

    This rank's tokens make S to reach S + added: `reach` is a number [B, H, 1, 1], a number for each row [B, H, D, 1],
    or a matrix [B, H, D, D].
    """
    widths = reach[0, 0].numel(), added[0, 0].numel()
    summaries = all_gather(torch.cat([reach.flatten(2), added.flatten(2)], -1), group)
    ends = [state]
    for summary in summaries:
        by_reach, by_added = (
            part.view(x.shape) for part, x in zip(summary.split(widths, -1), (reach, added), strict=True)
        )
        kept = by_reach * ends[-1] if reach.shape[-1] == 1 else by_reach @ ends[-1]
        ends.append(kept + by_added)
    # Indexed out of one tensor, each rank's S depends on every rank's: so every rank calls the backward pass of the
    # gather, the first rank too.
    everywhere = torch.stack(ends)
    return everywhere[group.rank()], everywhere[-1].clone()
