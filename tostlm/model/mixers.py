"""Token mixers. Each maps x [B, T, C] and what it remembers of the tokens before to y [B, T, C] and a new memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.parallel import all_gather, heads_to_sequence, sequence_to_heads
from tostlm.tssa import State, Statistics, tssa
from tostlm.tssa.context_parallel import tssa_over_ranks


class SequencePositions(NamedTuple):
    """Where the tokens of a call stand: in the context, whose tokens are numbered from 0, and in its documents.

    A document goes from one reset to the next; nothing before its first token has any influence on it.
    """

    start: int  # number of the first of these tokens
    end: int  # tokens of the context with these, and with those of the other ranks
    reset: Tensor | None  # [B, T] bool, True at the first token of a document
    first: Tensor | None  # [B, T] or [B, 1], number of the first token of each token's document; None is 0
    last: Tensor | None  # [B, 1], the same of the document in which the context ends
    positions: Tensor  # [T] or [B, T], of each token in its document
    mask: Tensor | None  # [S, end] or [B, 1, S, end], what softmax may see; None is all up to the token itself
    group: dist.ProcessGroup | None  # whose ranks hold T tokens each of the S of this call

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        past: int,
        document: Tensor | None,
        reset: Tensor | None,
        softmax: bool,
        group: dist.ProcessGroup | None = None,
    ) -> SequencePositions:
        """The place of tokens [B, T] after `past` others, the sequences being in documents that began at [B, 1]."""
        T, device = tokens.shape[1], tokens.device
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        start, end = past + rank * T, past + ranks * T
        numbers = torch.arange(start, start + T, device=device)
        first = last = firsts = document
        if reset is not None:
            first = firsts = numbers.where(reset, 0 if document is None else document).cummax(1).values
            last = first[:, -1:].clone()  # a view would keep all T alive
            if group is not None:
                lasts = all_gather(last, group).cummax(0).values
                last = lasts[-1]
                first = firsts = first.maximum(lasts[rank - 1]) if rank else first
                if softmax:
                    firsts = all_gather(first, group).movedim(0, 1).flatten(1)  # of all ranks' tokens
        positions = numbers if first is None else numbers - first
        mask = _mask(past, end, firsts, device) if softmax else None
        return cls(start, end, reset, first, last, positions, mask, group)

    def rows(self, table: Tensor) -> Tensor:
        """The rows of a table of positions [P, K] at the tokens' own: [T, K] without resets, [B, T, K] with."""
        if self.first is None:
            return table[self.start : self.start + self.positions.shape[-1]]
        return F.embedding(self.positions, table)

    @property
    def longest(self) -> int:
        """Tokens of the longest document that reaches into this call, or of the context where there never was one."""
        if self.first is None:
            return self.end
        position = self.positions.max()
        return int(position if self.group is None else all_gather(position, self.group).max()) + 1


def _mask(past: int, end: int, firsts: Tensor | None, device: torch.device) -> Tensor | None:
    """`SequencePositions.mask` of tokens `past` to `end`, whose documents' first ones are numbered [B, S] or [B, 1]."""
    if firsts is None and (past == 0 or end - past == 1):
        return None
    mask = torch.ones(end - past, end, dtype=torch.bool, device=device).tril(past)
    if firsts is None:
        return mask
    return mask & (torch.arange(end, device=device) >= firsts[:, None, :, None])


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, State | None]  # of tssa()


class TSSA(nn.Module):
    """Token statistics self-attention: one projection in, the operator, one projection out.

    Source: `CausalSelfAttention_TSSA` in the authors' release.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        self.temp = nn.Parameter(torch.empty(config.heads))
        self.bias = nn.Parameter(torch.empty(config.positions, config.heads)) if config.positions else None
        self.halflife_tokens = config.halflife_tokens

    def forward(self, x: Tensor, place: SequencePositions, state: State | None) -> tuple[Tensor, State]:
        operands = self._operands(x, place, state)
        y, state = tssa(*operands) if place.group is None else tssa_over_ranks(*operands, place.group)
        return self.out_proj(y), state

    def statistics(self, x: Tensor, place: SequencePositions, state: State | None) -> Statistics:
        """What the operator does in a forward pass, in numbers; of this rank's tokens alone where ranks share them."""
        return tssa(*self._operands(x, place, state), return_stats=True)[2]

    def _operands(self, x: Tensor, place: SequencePositions, state: State | None) -> Operands:
        w = self.in_proj(x)
        bias = None if self.bias is None else place.rows(self.bias)
        rho = None
        if self.halflife_tokens is not None:
            rho = _decays(*self.halflife_tokens, self.temp.shape[0], x.device)
        return w, self.temp, bias, rho, place.reset, state


def _decays(first: float, last: float, heads: int, device: torch.device) -> Tensor:
    """What each head keeps of its sums from one token to the next, 2^(-1/half-life): [H]."""
    halflives = first * (last / first) ** torch.linspace(0, 1, heads, device=device)
    return 2.0 ** (-1 / halflives)


class KVState(NamedTuple):
    """Keys and values of the tokens before, [B, H, T, D] each: it grows with the context.

    Where ranks share a context, each has those of its heads.
    """

    keys: Tensor
    values: Tensor

    def select(self, rows: Tensor) -> KVState:
        """The states of the sequences `rows` [B']."""
        return KVState(*(x.index_select(0, rows) for x in self))


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, GPT-2's mixer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.in_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, place: SequencePositions, state: KVState | None) -> tuple[Tensor, KVState]:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # [B, H, T, D]
            for part in self.in_proj(x).split(C, dim=-1)
        )
        if place.group is not None:
            q, k, v = heads_to_sequence(torch.stack([q, k, v]), place.group)
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        is_causal = place.mask is None and q.shape[2] > 1  # a single token sees all there is
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=place.mask, is_causal=is_causal)
        if place.group is not None:
            y = sequence_to_heads(y, place.group)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C)), KVState(k, v)


MixerState = State | KVState
