"""A base of mixers with a matrix of memory in each head, which differ in how they write it.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tostlm.model.config import ModelConfig
from tostlm.model.mixers.base import Mixer, MixerState
from tostlm.model.parts.gated_output import GatedOutput
from tostlm.model.parts.keys_queries_values import KeysQueriesValues, MatrixMixerOptions, ReadsAndWrites
from tostlm.model.parts.matrix_state import ChunkDecays
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


class MatrixMixer(Mixer):
    """Keys, queries and values of the tokens, a memory of them, and what is read of it, normalized and gated.

    The first field of a state is the matrix [B, H, D, D], the last the tail of the convolution as `KeysQueriesValues`
    has it. Between them is what else `remember` keeps.
    """

    constant_state = True
    context_parallel = "sequence"
    has_values = True
    no_weight_decay = frozenset({"memory.conv.weight"})

    def __init__(self, config: ModelConfig, options: MatrixMixerOptions, own_strengths: bool = False) -> None:
        super().__init__(config, options)
        self.memory = KeysQueriesValues(config, options, own_strengths)
        self.output = GatedOutput(config, gated=options.gate == "output")

    def values(self, x: Tensor) -> Tensor:
        return self.memory.values(x)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: MixerState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], MixerState]:
        tokens, tail = self.memory(x, None if state is None else state[-1], positions, added_values)
        with torch.autocast(x.device.type, enabled=False):
            before = self.empty(tokens.keys) if state is None else state[:-1]
            decays = ChunkDecays.build(tokens.log_decays, positions, *x.shape[:2])
            y, after = self.remember(tokens, decays, positions, before)
        return self.output(y, x), self.state_class(*after, tail)

    def empty(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of the state but the tail at the start of a context of keys [B, T, H, D]: the matrix, 0."""
        B, _, H, D = keys.shape
        return (keys.new_zeros(B, H, D, D),)

    @abstractmethod
    def remember(
        self, tokens: ReadsAndWrites, decays: ChunkDecays, positions: SequencePositions, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the tokens read [B, T, H, D], and the fields of `empty` after them.

        Args:
            decays: of what the heads remember, in chunks.
            before: the fields of `empty` before the tokens.
        """

    @abstractmethod
    def memory_flops(self, context: int) -> float:
        """Return the floating-point operations of `remember` per token, on average over `context` tokens."""

    def reset_parameters(self, generator: torch.Generator) -> None:
        self.memory.reset_parameters(generator)
        self.output.reset_parameters(generator)

    def flops_per_token(self, context: int) -> float:
        return self.memory.flops_per_token() + self.output.flops_per_token() + self.memory_flops(context)

    def statistics(self, x: Tensor, positions: SequencePositions, state: MixerState | None) -> dict[str, Tensor]:
        """Return how far the heads remember, and the mean gate of the output."""
        return self.memory.forgetting.horizons(x) | self.output.mean_gate(x)

    def state_bytes(self, context: int) -> int:
        C, D = self.config.width, self.config.width // self.config.heads
        return 4 * C * D + self.memory.tail_bytes()
