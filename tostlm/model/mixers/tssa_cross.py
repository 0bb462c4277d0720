"""TSSA with cross statistics: the whole second moment of keys and values that each head has seen, at constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tostlm.model.config import ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.gated_output import GatedOutput
from tostlm.model.parts.keys_queries_values import KeysQueriesValues, MatrixMixerOptions
from tostlm.model.parts.matrix_state import CHUNK, add_outer_products
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


@dataclass(frozen=True)
class TSSACrossOptions(MatrixMixerOptions):
    """Options of TSSA with cross statistics."""

    mixer: Literal["tssa_cross"] = "tssa_cross"


class TSSACrossState(NamedTuple):
    """What a layer remembers: the cross statistics, and the tokens that the convolutions still reach."""

    cross: Tensor  # [B, H, D, D], the running sum of b k v^T
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class TSSACross(Mixer):
    """S_t = a_t S_{t-1} + b_t k_t v_t^T in each head, read as S_t^T q_t, normalized and gated.

    TSSA remembers the diagonal of S alone, where k = v = w. Keys, strengths b and decays a: `KeysQueriesValues`.
    """

    options_class = TSSACrossOptions
    state_class = TSSACrossState
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"memory.conv.weight"})

    def __init__(self, config: ModelConfig, options: TSSACrossOptions) -> None:
        super().__init__(config, options)
        self.memory = KeysQueriesValues(config, options)
        self.output = GatedOutput(config, gated=options.gate == "output")

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: TSSACrossState | None
    ) -> tuple[Float[Tensor, "B T C"], TSSACrossState]:
        before, tail = (None, None) if state is None else state
        (k, q, v, strengths, log_decays), tail = self.memory(x, tail, positions)
        with torch.autocast(x.device.type, enabled=False):
            y, cross = add_outer_products(q, k * strengths[..., None], v, log_decays, positions, before)
        return self.output(y, x), TSSACrossState(cross, tail)

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.memory.reset_parameters(generator)
        self.output.reset_parameters(generator)

    def flops_per_token(self, context: int) -> float:
        C, D = self.config.width, self.config.width // self.config.heads
        # Scores and values of half a chunk's pairs on average, the state's update and its reading.
        return self.memory.flops_per_token() + self.output.flops_per_token() + 2.0 * C * (min(CHUNK, context) + 2 * D)

    def state_bytes(self, context: int) -> int:
        C, D = self.config.width, self.config.width // self.config.heads
        return 4 * C * D + self.memory.tail_bytes()
