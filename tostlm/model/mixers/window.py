"""Softmax attention over the last few tokens, with a state of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tostlm.model.config import ModelConfig
from tostlm.model.parts.attention import AttentionOptions
from tostlm.model.parts.near_attention import NearAttention


@dataclass(frozen=True)
class WindowOptions(AttentionOptions):
    """Options of sliding-window attention: those of softmax attention, rotary by default, and the window."""

    mixer: Literal["window"] = "window"
    window_tokens: int = 128  # tokens that each token reads, itself included
    rotary_base: float | None = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_tokens < 2:
            raise ValueError(f"window_tokens {self.window_tokens} must be 2 or more")


class WindowState(NamedTuple):
    """Keys and values of the last W - 1 tokens, zeros where there were fewer, and what the convolutions reach."""

    last: Tensor  # [B, W - 1, 2C], keys and values
    tail: Tensor  # [B, max(0, short_conv - 1), 3C]


class WindowAttention(NearAttention):
    """Softmax attention in which a token reads itself and the W - 1 before it, in its document."""

    options_class = WindowOptions
    state_class = WindowState

    def __init__(self, config: ModelConfig, options: WindowOptions) -> None:
        super().__init__(config, options)
        self.span = options.window_tokens

    def reach(self, positions: Tensor) -> Tensor:
        return positions.clamp_max(self.span - 1)

    def flops_per_token(self, context: int) -> float:
        return self.projection_flops() + 4 * self.config.width * min(self.span, context / 2)
