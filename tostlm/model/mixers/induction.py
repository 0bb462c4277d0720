"""A memory of what followed what: from the features of a token to the token after it, in one matrix.

Shapes: B sequences, T tokens, C channels, D channels of a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.matrix_state import ChunkDecays, delta_rule, delta_rule_flops
from tostlm.model.parts.neighbours import predecessors
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

EPS = 1e-6  # of the length of a key
SHORTEST_HALFLIFE = 1e-3  # tokens: what is left after one is 0 in fp32


@dataclass(frozen=True)
class InductionOptions(MixerOptions):
    """Options of the memory."""

    mixer: Literal["induction"] = "induction"
    key_channels: int = 512  # D of the keys: about as many are remembered
    halflife_tokens: float | None = 8192.0  # of what is remembered, the same for all tokens; None for ever

    def __post_init__(self) -> None:
        if self.key_channels < 1:
            raise ValueError(f"key_channels {self.key_channels} must be 1 or more")
        if self.halflife_tokens is not None and not self.halflife_tokens >= SHORTEST_HALFLIFE:
            raise ValueError(
                f"halflife_tokens {self.halflife_tokens} must be {SHORTEST_HALFLIFE} or more; null never forgets"
            )


class InductionState(NamedTuple):
    """What a layer remembers."""

    memory: Tensor  # [B, 1, D, C]
    features: Tensor  # [B, 1, D], w of the last token, under which the next one is written


class Induction(Mixer):
    """An induction head in constant memory: what it reads at a token is what followed the tokens most like it.

        w_t = relu(U x_t)^2                   one projection for keys and queries, as TSSA has one for all
        k_t = w_{t-1} / |w_{t-1}|             0 at a document's first token
        q_t = w_t / |w_t|
        S_t = a S_{t-1} + b_t k_t (W_v x_t - a S_{t-1}^T k_t)^T
        y_t = W_o (2 sigmoid(G x_t) S_t^T q_t)

    The features are sparse: they tell apart more tokens than a linear map of C channels could, and tokens that have no
    channel in common leave each other's memory alone.

    b_t = sigmoid(W_b x_t + c) is how much of what was there is replaced. The decay a is fixed. Decays that each token
    chooses soon leave a memory of a few tokens, which is what pays first, and nothing from farther away to learn from.
    What is read keeps its length, which says how sure it is: a norm a head would make noise of what it has not seen.

    W_o starts as the transpose of W_v and G at zero, so from the first step a layer proposes copies of what followed,
    in a tenth of the residual stream's size: with LayerScale or without.

    Sources: induction heads (arXiv 2209.11895); the delta rule (arXiv 2102.11174).
    """

    options_class = InductionOptions
    state_class = InductionState
    constant_state = True
    context_parallel = "sequence"
    layer_scale = 0.1

    def __init__(self, config: ModelConfig, options: InductionOptions) -> None:
        super().__init__(config, options)
        C, self.D = config.width, options.key_channels
        self.features_proj = nn.Linear(C, self.D, bias=False)
        self.values_proj = nn.Linear(C, C, bias=False)
        self.write_proj = nn.Linear(C, 1)
        self.gate_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: InductionState | None
    ) -> tuple[Float[Tensor, "B T C"], InductionState]:
        B, T, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        w, v = self.features_proj(x).to(wide).relu().square(), self.values_proj(x).to(wide)
        previous, last = predecessors(w, None if state is None else state.features, positions)  # [B, T, D]
        q, k = (F.normalize(features, dim=-1, eps=EPS)[:, :, None] for features in (w, previous))
        strengths = self.write_proj(x).to(wide).sigmoid()  # [B, T, 1]
        with torch.autocast(x.device.type, enabled=False):
            decays = ChunkDecays.build(self._log_decay(w), positions, B, T)
            memory = w.new_zeros(B, 1, self.D, v.shape[-1]) if state is None else state.memory
            y, memory = delta_rule(q, k, k, v[:, :, None], strengths, decays, positions, memory)
        y = y[:, :, 0].to(x.dtype) * (2 * self.gate_proj(x).sigmoid())
        return self.out_proj(y), InductionState(memory, last)

    def _log_decay(self, like: Tensor) -> Tensor:
        """Return log a [1, 1, 1]."""
        halflife = self.options.halflife_tokens
        return like.new_full((1, 1, 1), 0.0 if halflife is None else -math.log(2) / halflife)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        # Keys have length 1 whatever the scale of U: at this one, learning rates change it slowly enough to stay tied
        # to what it has written.
        std = 1 / math.sqrt(self.config.width)
        self.features_proj.weight.normal_(0, std, generator=generator)
        self.values_proj.weight.normal_(0, std, generator=generator)
        scale = self.layer_scale if self.config.layer_scale is None else 1.0
        self.out_proj.weight.copy_(scale * self.values_proj.weight.t())
        if self.config.output_init == "zero":
            self.out_proj.weight.zero_()
        for parameter in (self.write_proj.weight, self.write_proj.bias, self.gate_proj.weight):
            parameter.zero_()

    def flops_per_token(self, context: int) -> float:
        matrices = 2.0 * sum(p.numel() for p in self.parameters())
        return matrices + delta_rule_flops(1, self.D, self.config.width, context)

    def state_bytes(self, context: int) -> int:
        return 4 * self.D * (self.config.width + 1)
