"""The gated delta net whose writes are preconditioned by TSSA's running second moment.

Shapes: B sequences, T tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tostlm.model.config import ModelConfig
from tostlm.model.parts.keys_queries_values import MatrixMixerOptions, ReadsAndWrites
from tostlm.model.parts.matrix_mixer import MatrixMixer
from tostlm.model.parts.matrix_state import ChunkDecays, delta_rule, delta_rule_flops
from tostlm.model.parts.running_sums import running_sums, running_sums_flops
from tostlm.model.positions import SequencePositions
from tostlm.tssa.reference import EPS

RANGE = 1.5  # of the squash: a channel is written by 1 / RANGE to RANGE of its key
FLOOR = 1e-6  # added to a channel's share, so that one never written has a logarithm


@dataclass(frozen=True)
class TSSADeltaOptions(MatrixMixerOptions):
    """Options of the preconditioned delta rule."""

    mixer: Literal["tssa_delta"] = "tssa_delta"


class TSSADeltaState(NamedTuple):
    """What a layer remembers: the matrices, the moments, and the tokens that the convolutions still reach."""

    memory: Tensor  # [B, H, D, D]
    moment: Tensor  # [B, H, D] float64, the running sum of b w^2
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class TSSADelta(MatrixMixer):
    """The gated delta rule whose steps are shorter in channels that a head has written much to.

    Keys k = w / |w|, strengths b and decays a: `KeysQueriesValues`. In each head, with a learned center g:

        m_t = a_t m_{t-1} + b_t w_t^2         c_t the mean of m_t over the channels
        P_t = squash(m_t / c_t)               squash(u) = 1.5^(-z / (1 + |z|)), z = log u - g
        S_t = a_t S_{t-1} + b_t P_t k_t (v_t - a_t S_{t-1}^T k_t)^T

    The delta rule descends a least-squares loss of values against keys. m is the diagonal of its curvature, each token
    weighted by |w|^2 as in TSSA: channels that are written often take shorter steps, others longer ones. As c is the
    mean of m itself, P depends neither on how much a head remembers nor on the scale of w.

    The step is stable: I - b P k k^T is similar to the symmetric I - b (P^1/2 k)(P^1/2 k)^T, whose one eigenvalue other
    than 1 is 1 - b k^T P k. With b in (0, 1), |k| <= 1 and P in (1 / 1.5, 1.5) it is in (-0.5, 1], whatever m and g.

    Source: Preconditioned DeltaNet (arXiv 2604.21100), for the rule, the squash, its range and the learned center.
    There m is of k, with decays and strengths of its own, and c is 1.
    """

    options_class = TSSADeltaOptions
    state_class = TSSADeltaState

    def __init__(self, config: ModelConfig, options: TSSADeltaOptions) -> None:
        super().__init__(config, options)
        self.center = nn.Parameter(torch.empty(config.heads))

    def empty(self, keys: Tensor) -> tuple[Tensor, ...]:
        return *super().empty(keys), keys.new_zeros(keys[:, 0].shape, dtype=torch.float64)

    def remember(
        self, tokens: ReadsAndWrites, decays: ChunkDecays, positions: SequencePositions, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k, w, q, v, strengths, _ = tokens
        memory, moment = before
        m, moment = running_sums(strengths[..., None] * w.square(), decays, positions, moment)  # [B, T, H, D]
        y, memory = delta_rule(q, k, self._squash(m) * k, v, strengths, decays, positions, memory)
        return y, (memory, moment)

    def _squash(self, m: Tensor) -> Tensor:
        """Return P [B, T, H, D] of the moments m [B, T, H, D]."""
        share = m / m.mean(-1, keepdim=True).clamp_min(EPS)
        z = torch.log(share + FLOOR) - self.center[:, None]
        return torch.exp(-math.log(RANGE) * z / (1 + z.abs()))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.center.zero_()

    def memory_flops(self, context: int) -> float:
        C, H = self.config.width, self.config.heads
        D = C // H
        return delta_rule_flops(H, D, D, context) + running_sums_flops(C, context)

    def state_bytes(self, context: int) -> int:
        return super().state_bytes(context) + 8 * self.config.width
