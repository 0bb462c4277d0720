"""TSSA with cross statistics: the whole second moment of keys and values that each head has seen, at constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tostlm.model.parts.keys_queries_values import MatrixMixerOptions, ReadsAndWrites
from tostlm.model.parts.matrix_mixer import MatrixMixer
from tostlm.model.parts.matrix_state import CHUNK, add_outer_products
from tostlm.model.positions import SequencePositions


@dataclass(frozen=True)
class TSSACrossOptions(MatrixMixerOptions):
    """Options of TSSA with cross statistics."""

    mixer: Literal["tssa_cross"] = "tssa_cross"


class TSSACrossState(NamedTuple):
    """What a layer remembers: the cross statistics, and the tokens that the convolutions still reach."""

    cross: Tensor  # [B, H, D, D], the running sum of b k v^T
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class TSSACross(MatrixMixer):
    """S_t = a_t S_{t-1} + b_t k_t v_t^T in each head, read as S_t^T q_t, normalized and gated.

    TSSA remembers the diagonal of S alone, where k = v = w. Keys, strengths b and decays a: `KeysQueriesValues`.
    """

    options_class = TSSACrossOptions
    state_class = TSSACrossState

    def remember(
        self, tokens: ReadsAndWrites, positions: SequencePositions, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, q, v, strengths, log_decays = tokens
        return add_outer_products(q, k * strengths[..., None], v, log_decays, positions, memory)

    def memory_flops(self, context: int) -> float:
        C, D = self.config.width, self.config.width // self.config.heads
        # Scores and values of half a chunk's pairs on average, the state's update and its reading.
        return 2.0 * C * (min(CHUNK, context) + 2 * D)
