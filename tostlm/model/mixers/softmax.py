"""Causal softmax attention, whose keys and values grow with the context: GPT-2's mixer, and stronger forms of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.causal_attention import attend_causal
from tostlm.model.positions import SequencePositions
from tostlm.parallel import heads_to_sequence, sequence_to_heads
from tostlm.shapes import Float


@dataclass(frozen=True)
class SoftmaxOptions(AttentionOptions):
    """Options of softmax attention. Its defaults are GPT-2's."""

    mixer: Literal["softmax"] = "softmax"


class KVState(NamedTuple):
    """Keys and values of the tokens before, of this rank's heads where ranks share a context."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, D]
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], queries, keys and values before their convolution


class SoftmaxAttention(Attention):
    """Multi-head softmax attention without biases; by its options rotary, normalized, convolved and gated.

    Context-parallel ranks exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).
    """

    options_class = SoftmaxOptions
    state_class = KVState
    constant_state = False
    context_parallel = "heads"
    needs_spans = True

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: KVState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], KVState]:
        q, k, v, tail = self.project(x, positions, None if state is None else state.tail, added_values)
        if positions.group is not None:
            q, k, v = heads_to_sequence(torch.stack([q, k, v]), positions.group)
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        y = attend_causal(q, k, v, positions.spans, positions.step_mask)  # [B, H, T, D]
        if positions.group is not None:
            y = sequence_to_heads(y, positions.group)
        return self.finish(y, x), KVState(k, v, tail)

    def flops_per_token(self, context: int) -> float:
        # Scores and values over half the context on average.
        return self.projection_flops() + 4 * self.config.width * context / 2

    def state_bytes(self, context: int) -> int:
        return 2 * context * self.config.width * self.in_proj.weight.element_size() + self.tail_bytes()
