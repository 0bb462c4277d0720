"""Token mixers. Each maps x [B, T, C] and what it remembers of the tokens before to y [B, T, C] and a new memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.tssa import State, Stats, tssa


class Place(NamedTuple):
    """Where the tokens of a call stand: in the context, whose tokens are numbered from 0, and in its documents.

    A document goes from one reset to the next; nothing before its first token has any influence on it.
    """

    past: int  # tokens of the context before these
    end: int  # and with these
    reset: Tensor | None  # [B, T] bool, True at the first token of a document
    first: Tensor | None  # [B, T] or [B, 1], number of the first token of each token's document; None is 0
    positions: Tensor  # [T] or [B, T], of each token in its document
    mask: Tensor | None  # [T, end] or [B, 1, T, end], what softmax may see; None is all up to the token itself

    @classmethod
    def of(cls, tokens: Tensor, past: int, document: Tensor | None, reset: Tensor | None, softmax: bool) -> Place:
        """The place of tokens [B, T] after `past` others, the sequences being in documents that began at [B, 1]."""
        T, device = tokens.shape[1], tokens.device
        end = past + T
        numbers, first = torch.arange(past, end, device=device), document
        if reset is not None:
            first = numbers.where(reset, 0 if document is None else document).cummax(1).values
        positions = numbers if first is None else numbers - first
        mask = None
        if softmax and (first is not None or (past and T > 1)):
            mask = torch.ones(T, end, dtype=torch.bool, device=device).tril(past)
            if first is not None:
                mask = mask & (torch.arange(end, device=device) >= first[:, None, :, None])
        return cls(past, end, reset, first, positions, mask)

    def rows(self, table: Tensor) -> Tensor:
        """The rows of a table of positions [P, K] at the tokens' own: [T, K] without resets, [B, T, K] with."""
        return table[self.past : self.end] if self.first is None else F.embedding(self.positions, table)


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

    def forward(self, x: Tensor, place: Place, state: State | None) -> tuple[Tensor, State]:
        y, state = tssa(*self._operands(x, place, state))
        return self.out_proj(y), state

    def statistics(self, x: Tensor, place: Place, state: State | None) -> Stats:
        """What the operator does in a forward pass, in numbers."""
        return tssa(*self._operands(x, place, state), return_stats=True)[2]

    def _operands(self, x: Tensor, place: Place, state: State | None) -> Operands:
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
    """Keys and values of the tokens before, [B, H, T, D] each: it grows with the context."""

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

    def forward(self, x: Tensor, place: Place, state: KVState | None) -> tuple[Tensor, KVState]:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # [B, H, T, D]
            for part in self.in_proj(x).split(C, dim=-1)
        )
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        is_causal = place.mask is None and place.past == 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=place.mask, is_causal=is_causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C)), KVState(k, v)


MixerState = State | KVState
