"""Causal softmax attention: GPT-2's mixer, whose keys and values grow with the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.positions import SequencePositions
from tostlm.parallel import heads_to_sequence, sequence_to_heads
from tostlm.shapes import Float


@dataclass(frozen=True)
class SoftmaxOptions(MixerOptions):
    """Options of softmax attention: none."""

    mixer: Literal["softmax"] = "softmax"


class KVState(NamedTuple):
    """Keys and values of the tokens before, of this rank's heads where ranks share a context."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, D]


class SoftmaxAttention(Mixer):
    """Multi-head softmax attention with one projection in and one out, without biases.

    Context-parallel ranks exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).
    """

    options_class = SoftmaxOptions
    state_class = KVState
    constant_state = False
    context_parallel = "heads"
    needs_attention_mask = True

    def __init__(self, config: ModelConfig, options: SoftmaxOptions) -> None:
        super().__init__(config, options)
        self.in_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: KVState | None
    ) -> tuple[Float[Tensor, "B T C"], KVState]:
        B, T, C = x.shape
        H = self.config.heads
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in self.in_proj(x).split(C, dim=-1))
        if positions.group is not None:
            q, k, v = heads_to_sequence(torch.stack([q, k, v]), positions.group)
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        mask = positions.attention_mask
        is_causal = mask is None and q.shape[2] > 1  # a single token attends to all before it
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # [B, H, T, D]
        if positions.group is not None:
            y = sequence_to_heads(y, positions.group)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C)), KVState(k, v)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.in_proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)

    def flops_per_token(self, context: int) -> float:
        C = self.config.width
        return 2.0 * 4 * C * C + 4 * C * context / 2  # scores and values over half the context on average

    def state_bytes(self, context: int) -> int:
        return 2 * context * self.config.width * self.in_proj.weight.element_size()
