"""Token mixers. Each maps x [B, T, C] and what it remembers of the tokens before to y [B, T, C] and a new memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.tssa import State, tssa


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

    def forward(self, x: Tensor, start: int, state: State | None) -> tuple[Tensor, State]:
        """`start` is the position of x's first token in its document."""
        w = self.in_proj(x)
        bias = None if self.bias is None else self.bias[start : start + x.shape[1]]
        rho = None
        if self.halflife_tokens is not None:
            rho = _decays(*self.halflife_tokens, self.temp.shape[0], x.device)
        y, state = tssa(w, self.temp, bias, rho, state=state)
        return self.out_proj(y), state


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

    def forward(self, x: Tensor, start: int, state: KVState | None) -> tuple[Tensor, KVState]:
        """`start` is the position of x's first token in its document."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # [B, H, T, D]
            for part in self.in_proj(x).split(C, dim=-1)
        )
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        past = k.shape[2] - T
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C)), KVState(k, v)


MixerState = State | KVState
