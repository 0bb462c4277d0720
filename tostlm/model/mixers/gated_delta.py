"""The gated delta net: a matrix of memory in each head that unlearns what it would read before it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tostlm.model.config import ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.gated_output import GatedOutput
from tostlm.model.parts.keys_queries_values import KeysQueriesValues, MatrixMixerOptions
from tostlm.model.parts.matrix_state import CHUNK, delta_rule
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


@dataclass(frozen=True)
class GatedDeltaOptions(MatrixMixerOptions):
    """Options of the gated delta net."""

    mixer: Literal["gated_delta"] = "gated_delta"


class GatedDeltaState(NamedTuple):
    """What a layer remembers: the matrices, and the tokens that the convolutions still reach."""

    memory: Tensor  # [B, H, D, D]
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class GatedDelta(Mixer):
    """S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T in each head, read as S_t^T q_t, normalized and gated.

    Keys, strengths b and decays a: `KeysQueriesValues`. Source: Gated DeltaNet (arXiv 2412.06464).
    """

    options_class = GatedDeltaOptions
    state_class = GatedDeltaState
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"memory.conv.weight"})

    def __init__(self, config: ModelConfig, options: GatedDeltaOptions) -> None:
        super().__init__(config, options)
        self.memory = KeysQueriesValues(config, options)
        self.output = GatedOutput(config, gated=options.gate == "output")

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: GatedDeltaState | None
    ) -> tuple[Float[Tensor, "B T C"], GatedDeltaState]:
        before, tail = (None, None) if state is None else state
        (k, q, v, strengths, log_decays), tail = self.memory(x, tail, positions)
        with torch.autocast(x.device.type, enabled=False):
            y, memory = delta_rule(q, k, k, v, strengths, log_decays, positions, before)
        return self.output(y, x), GatedDeltaState(memory, tail)

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.memory.reset_parameters(generator)
        self.output.reset_parameters(generator)

    def flops_per_token(self, context: int) -> float:
        C, D, L = self.config.width, self.config.width // self.config.heads, min(CHUNK, context)
        # Half a chunk's pairs on average: keys' and queries' scores, what is solved (V + D wide), its reading. Then the
        # chunk's matrix, what is taken from the state, the state's update and its reading.
        pairs, products = 2.0 * C * L / 2 * 5, 2.0 * C * D * 4
        return self.memory.flops_per_token() + self.output.flops_per_token() + pairs + products

    def state_bytes(self, context: int) -> int:
        C, D = self.config.width, self.config.width // self.config.heads
        return 4 * C * D + self.memory.tail_bytes()
