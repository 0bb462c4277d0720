"""The gated delta net: a matrix of memory in each head that unlearns what it would read before it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tostlm.model.parts.keys_queries_values import MatrixMixerOptions, ReadsAndWrites
from tostlm.model.parts.matrix_mixer import MatrixMixer
from tostlm.model.parts.matrix_state import ChunkDecays, delta_rule, delta_rule_flops
from tostlm.model.positions import SequencePositions


@dataclass(frozen=True)
class GatedDeltaOptions(MatrixMixerOptions):
    """Options of the gated delta net."""

    mixer: Literal["gated_delta"] = "gated_delta"


class GatedDeltaState(NamedTuple):
    """What a layer remembers: the matrices, and the tokens that the convolutions still reach."""

    memory: Tensor  # [B, H, D, D]
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class GatedDelta(MatrixMixer):
    """S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T in each head, read as S_t^T q_t, normalized and gated.

    Keys, strengths b and decays a: `KeysQueriesValues`. Source: Gated DeltaNet (arXiv 2412.06464).
    """

    options_class = GatedDeltaOptions
    state_class = GatedDeltaState

    def remember(
        self, tokens: ReadsAndWrites, decays: ChunkDecays, positions: SequencePositions, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k, _, q, v, strengths, _ = tokens
        y, memory = delta_rule(q, k, k, v, strengths, decays, positions, *before)
        return y, (memory,)

    def memory_flops(self, context: int) -> float:
        D = self.config.width // self.config.heads
        return delta_rule_flops(self.config.heads, D, D, context)
