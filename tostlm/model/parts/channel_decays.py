"""A matrix of memory in each head of which each channel of the keys decays at its own pace, in chunks of tokens.

It is written by adding, S_t = diag(w_t) S_{t-1} + k_t v_t^T, or by the generalized delta rule, which first takes out
what it reads at one key by another: S_t = (diag(w_t) - b_t p_t^T) S_{t-1} + k_t v_t^T. It is read as y_t = S_t^T q_t.

The weight of a pair of tokens i >= j is sum_d q_i[d] k_j[d] w_{j+1}[d] ... w_i[d]. For all pairs of a chunk it is a
product of matrices only where the decays are factored into one of i and one of j, as seen from a token in the middle.
Numbers are fp32, or float64 where the inputs are.

Shapes: B sequences, T tokens, H heads, D channels of a head's keys, V of its values, N chunks of L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.parts.matrix_state import carry, chunk_tokens, chunked, delta_carry, documents_in_chunks
from tostlm.model.parts.triangular import solve_unit_lower
from tostlm.model.positions import SequencePositions

SMALL = 4  # tokens of the largest blocks whose products are faster one by one than as matrices


def add_decaying_outer_products(
    q: Tensor, k: Tensor, v: Tensor, log_decays: Tensor, positions: SequencePositions, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, H, V] of S_t = diag(w_t) S_{t-1} + k_t v_t^T, and S [B, H, D, V] after the last of all ranks.

    Args:
        q, k: [B, T, H, D], queries and keys.
        v: [B, T, H, V], values.
        log_decays: [B, T, H, D], logs of w_t, however small. A document's first token forgets everything before it.
        state: [B, H, D, V], S before the first token of the call; None is 0.

    Source: gated linear attention (arXiv 2312.06635).
    """
    (B, T, H, D), V = k.shape, v.shape[-1]
    if positions.document_start_mask is not None:
        log_decays = log_decays.masked_fill(positions.document_start_mask[..., None, None], -torch.inf)
    q, k, v, log_decays = (chunked(x, _chunk_length(T, q.device)) for x in (q, k, v, log_decays))  # [B, N, H, L, D]
    weights, from_start, to_end = _joined(q, k, log_decays.exp())
    added = (k * to_end).transpose(-1, -2) @ v  # [B, N, H, D, V], by each chunk
    before = k.new_zeros(B, H, D, V) if state is None else state
    carried, last = carry(added, from_start[..., -1, :, None], before, positions.group)
    y = weights @ v + (q * from_start) @ carried
    return y.transpose(2, 3).flatten(1, 2)[:, :T], last


def _chunk_length(T: int, device: torch.device) -> int:
    """Tokens of a chunk: a power of two, so that it has halves."""
    return min(chunk_tokens(device), 1 << (T - 1).bit_length())


def _joined(q: Tensor, k: Tensor, decays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's weights of pairs, and its decays from what comes in to each token, and from each to the end.

    Blocks of one token are joined into blocks of two, and so on. Between the halves of a block decays are factored at
    the boundary. All factors are products of decays: none overflows, one that underflows belongs to a weight that does,
    and there are no differences of logs, which lose what is small beside them.

    Args:
        q, k: [..., L, D]. L is a power of two.
        decays: [..., L, D], w_t.

    Returns:
        [..., L, L], 0 above the diagonal, and twice [..., L, D]: with each token's own decay, and without.
    """
    weights = (q * k).sum(-1)[..., None, None]  # [..., blocks, size, size]
    from_start = decays[..., None, :]  # [..., blocks, size, D]
    to_end = torch.ones_like(from_start)
    while (size := weights.shape[-1]) < decays.shape[-2]:
        first, second = weights.unflatten(-3, (-1, 2)).unbind(-3)
        from_first, from_second = from_start.unflatten(-3, (-1, 2)).unbind(-3)
        to_first, to_second = to_end.unflatten(-3, (-1, 2)).unbind(-3)
        reading = q.unflatten(-2, (-1, 2, size))[..., 1, :, :] * from_second
        written = k.unflatten(-2, (-1, 2, size))[..., 0, :, :] * to_first
        if size <= SMALL:
            across = (reading[..., :, None, :] * written[..., None, :, :]).sum(-1)
        else:
            across = reading @ written.transpose(-1, -2)
        weights = torch.cat([F.pad(first, (0, size)), torch.cat([across, second], -1)], -2)
        from_start = torch.cat([from_first, from_first[..., -1:, :] * from_second], -2)
        to_end = torch.cat([to_first * from_second[..., -1:, :], to_second], -2)
    return weights.squeeze(-3), from_start.squeeze(-3), to_end.squeeze(-3)


class BoundedDecays(NamedTuple):
    """What is left of each channel between tokens of a chunk, by logs that fp32 can exponentiate either way."""

    logs: Tensor  # [B, N, H, L, D], from what comes into the chunk to token i, its own decay included
    logs_before: Tensor  # [B, N, H, L, D], the same without token i's own decay
    documents: Tensor | None  # [B, N, 1, L], documents that have started in the chunk up to token i; None where none do

    @property
    def length(self) -> int:
        """Tokens L of a chunk."""
        return self.logs.shape[-2]

    @classmethod
    def build(cls, log_decays: Tensor, positions: SequencePositions) -> BoundedDecays:
        """Build them from log_decays [B, T, H, D], logs of w_t."""
        L = _chunk_length(log_decays.shape[1], log_decays.device)
        logs = chunked(log_decays, L).cumsum(-2)  # what pads the last chunk does not decay
        return cls(logs, F.pad(logs[..., :-1, :], (0, 0, 1, 0)), documents_in_chunks(positions, L))

    def from_start(self, logs: Tensor) -> Tensor:
        """exp(logs), of `logs` or `logs_before`, where the document that comes into the chunk goes on; 0 elsewhere."""
        return logs.exp() if self.documents is None else logs.exp() * (self.documents == 0)[..., None]

    def to_end(self) -> Tensor:
        """[B, N, H, L, D], from token j to the end of the chunk; 0 of documents that have ended by then."""
        left = (self.logs[..., -1:, :] - self.logs).exp()
        return left if self.documents is None else left * (self.documents == self.documents[..., -1:])[..., None]

    def whole(self) -> Tensor:
        """[B, N, H, D], from what comes into the chunk to its end."""
        left = self.logs[..., -1, :].exp()
        return left if self.documents is None else left * (self.documents[..., -1:] == 0)

    def pairs(self) -> Tensor:
        """[L, L] or [B, N, 1, L, L] bool, True at [i, j] where token j is of token i's document and not later."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.logs.device).tril()
        if self.documents is None:
            return causal
        return causal & (self.documents[..., :, None] == self.documents[..., None, :])


def generalized_delta_rule(
    q: Tensor,
    removed: Tensor,
    instead: Tensor,
    k: Tensor,
    v: Tensor,
    log_decays: Tensor,
    positions: SequencePositions,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, H, V] of S_t = (diag(w_t) - b_t p_t^T) S_{t-1} + k_t v_t^T, and the last S [B, H, D, V].

    What the tokens of a chunk read at their p, u_t = S_{t-1}^T p_t, solves (1 + M) u = A v + P S, of its pairs' weights
    M, of p and b, and A, of p and k: the WY form of products of Householder-like matrices. So a chunk needs of the S
    before it one product each way.

    Args:
        removed: [B, T, H, D], p, the keys at which S is read before it is written.
        instead: [B, T, H, D], b, the keys under which what was read is taken out.
        log_decays: [B, T, H, D], at least -1 a token: factors of half a chunk are then at most e^32. The others as in
            `add_decaying_outer_products`.

    Source: RWKV-7 (arXiv 2503.14456); the form in chunks as in DeltaNet (arXiv 2406.06484).
    """
    (B, T, H, D), V = k.shape, v.shape[-1]
    decays = BoundedDecays.build(log_decays, positions)
    q, p, b, k, v = (chunked(x, decays.length) for x in (q, removed, instead, k, v))  # [B, N, H, L, D]
    middle = decays.logs[..., (decays.length - 1) // 2, None, :]
    p_seen, q_seen = p * (decays.logs_before - middle).exp(), q * (decays.logs - middle).exp()
    seen = (middle - decays.logs).exp()
    k_seen, b_seen = ((x * seen).transpose(-1, -2) for x in (k, b))
    forbidden = ~decays.pairs()
    # p reads what was there before its token wrote.
    strictly = forbidden | torch.eye(decays.length, dtype=torch.bool, device=k.device)
    A, M = ((p_seen @ x).masked_fill(strictly, 0.0) for x in (k_seen, b_seen))  # [B, N, H, L, L]
    of_k, of_b = ((q_seen @ x).masked_fill(forbidden, 0.0) for x in (k_seen, b_seen))

    right = torch.cat([A @ v, p * decays.from_start(decays.logs_before)], -1)  # [B, N, H, L, V + D]
    own, reads = solve_unit_lower(M, right).split([V, D], -1)
    to_end = decays.to_end()
    k_ends, b_ends = ((x * to_end).mT for x in (k, b))  # [B, N, H, D, L]
    before = k.new_zeros(B, H, D, V) if state is None else state
    u, carried, last = delta_carry(own, reads, -b_ends, decays.whole()[..., None], k_ends @ v, before, positions.group)
    y = of_k @ v - of_b @ u + (q * decays.from_start(decays.logs)) @ carried
    return y.transpose(2, 3).flatten(1, 2)[:, :T], last
