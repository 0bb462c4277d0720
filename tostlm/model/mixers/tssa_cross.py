"""TSSA with cross statistics: the whole second moment of keys and values that each head has seen, at constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tostlm.model.config import ModelConfig
from tostlm.model.parts.keys_queries_values import MatrixMixerOptions, ReadsAndWrites
from tostlm.model.parts.matrix_mixer import MatrixMixer
from tostlm.model.parts.matrix_state import ChunkDecays, add_outer_products, outer_products_flops
from tostlm.model.parts.membership import scale_free_logits
from tostlm.model.parts.running_sums import running_sums, running_sums_flops
from tostlm.model.positions import SequencePositions


@dataclass(frozen=True)
class TSSACrossOptions(MatrixMixerOptions):
    """Options of TSSA with cross statistics."""

    mixer: Literal["tssa_cross"] = "tssa_cross"
    # How strongly a head writes a token: sigmoid(W_b x + c), or TSSA's scale-free membership, for which heads compete.
    write: Literal["sigmoid", "membership"] = "sigmoid"


class TSSACrossState(NamedTuple):
    """What a layer remembers: the cross statistics, what memberships need, and what the convolutions still reach."""

    cross: Tensor  # [B, H, D, D], the running sum of b k v^T
    energy: Tensor  # [B, H] float64, sum of |w|^2; [B, 0] unless memberships write
    remembered: Tensor  # [B, H] float64, sum of 1, in tokens; [B, 0] unless memberships write
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class TSSACross(MatrixMixer):
    """S_t = a_t S_{t-1} + b_t k_t v_t^T in each head, read as S_t^T q_t, normalized and gated.

    TSSA remembers the diagonal of S alone, where k = v = w. Keys k = w / |w|, strengths b and decays a:
    `KeysQueriesValues`. With `write: membership` b is the softmax over the heads of temp n, n of `scale_free_logits`,
    with the sums s_t = a_t s_{t-1} + |w_t|^2 and N_t = a_t N_{t-1} + 1.
    """

    options_class = TSSACrossOptions
    state_class = TSSACrossState

    def __init__(self, config: ModelConfig, options: TSSACrossOptions) -> None:
        members = options.write == "membership"
        super().__init__(config, options, own_strengths=members)
        self.temp = nn.Parameter(torch.empty(config.heads)) if members else None

    def empty(self, keys: Tensor) -> tuple[Tensor, ...]:
        zero = keys.new_zeros(keys.shape[0], 0 if self.temp is None else keys.shape[2], dtype=torch.float64)
        return *super().empty(keys), zero, zero

    def remember(
        self, tokens: ReadsAndWrites, decays: ChunkDecays, positions: SequencePositions, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        cross, *sums = before
        strengths = tokens.strengths
        if self.temp is not None:
            squares = tokens.raw_keys.square().sum(-1)  # [B, T, H]
            added = torch.stack([squares, torch.ones_like(squares)], -1)
            found, after = running_sums(added, decays, positions, torch.stack(sums, -1))
            n = scale_free_logits(squares, found[..., 0], found[..., 1], tokens.keys.shape[-1])
            strengths, sums = torch.softmax(self.temp * n, -1), list(after.unbind(-1))
        k = tokens.keys * strengths[..., None]
        y, cross = add_outer_products(tokens.queries, k, tokens.values, decays, positions, cross)
        return y, (cross, *sums)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        if self.temp is not None:
            self.temp.fill_(1.0)

    def memory_flops(self, context: int) -> float:
        C, H = self.config.width, self.config.heads
        return outer_products_flops(C, H, context) + (0 if self.temp is None else running_sums_flops(2 * H, context))

    def state_bytes(self, context: int) -> int:
        return super().state_bytes(context) + (0 if self.temp is None else 8 * 2 * self.config.heads)
