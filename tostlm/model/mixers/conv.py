"""A gated short convolution: what a layer needs that only looks at the tokens next to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.short_conv import MAX_TAPS, ShortConv, tail_bytes
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float


@dataclass(frozen=True)
class ConvOptions(MixerOptions):
    """Options of the convolution."""

    mixer: Literal["conv"] = "conv"
    taps: int = 4  # tokens that each token reads, itself included

    def __post_init__(self) -> None:
        if not 2 <= self.taps <= MAX_TAPS:
            raise ValueError(f"taps {self.taps} must be from 2 to {MAX_TAPS}")


class ConvState(NamedTuple):
    """The tokens that the convolution still reaches."""

    tail: Tensor  # [B, taps - 1, C], before their convolution


class Conv(Mixer):
    """y = W_o (silu(conv(W x)) sigmoid(G x)), the convolution causal, depthwise and within a document."""

    options_class = ConvOptions
    state_class = ConvState
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"conv.weight"})

    def __init__(self, config: ModelConfig, options: ConvOptions) -> None:
        super().__init__(config, options)
        C = config.width
        self.in_proj = nn.Linear(C, C, bias=False)
        self.conv = ShortConv(C, options.taps, silu=True)
        self.gate_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: ConvState | None
    ) -> tuple[Float[Tensor, "B T C"], ConvState]:
        y, tail = self.conv(self.in_proj(x), None if state is None else state.tail, positions)
        return self.out_proj(y * self.gate_proj(x).sigmoid()), ConvState(tail)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        for proj in (self.in_proj, self.gate_proj):
            proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.conv.reset_parameters(generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)

    def flops_per_token(self, context: int) -> float:
        return 2.0 * sum(p.numel() for p in self.parameters())

    def state_bytes(self, context: int) -> int:
        return tail_bytes(self.conv)
