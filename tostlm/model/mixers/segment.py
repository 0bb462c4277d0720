"""Softmax attention within segments of the document, each of which also sees the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tostlm.model.config import ModelConfig
from tostlm.model.parts.attention import AttentionOptions
from tostlm.model.parts.near_attention import NearAttention


@dataclass(frozen=True)
class SegmentOptions(AttentionOptions):
    """Options of segment attention: those of softmax attention, rotary by default, and the segment."""

    mixer: Literal["segment"] = "segment"
    segment_tokens: int = 128  # tokens of a segment; a token reads its own up to itself, and the one before
    rotary_base: float | None = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment_tokens < 1:
            raise ValueError(f"segment_tokens {self.segment_tokens} must be 1 or more")


class SegmentState(NamedTuple):
    """Keys and values of two segments' tokens but one, zeros where there were fewer, and the convolutions' reach."""

    last: Tensor  # [B, 2 segment_tokens - 1, 2C], keys and values
    tail: Tensor  # [B, max(0, short_conv - 1), 3C]


class SegmentAttention(NearAttention):
    """Softmax attention in which a token reads its own segment, up to itself, and the whole segment before.

    Segments are counted from a document's first token: so where a context is cut does not matter, and none has tokens
    of two documents. Through L layers a token depends on up to L + 1 segments.

    Source: the overlapping pairs of segments of ECP (arXiv 2412.06106), which are those of its predecessor LLP.
    """

    options_class = SegmentOptions
    state_class = SegmentState

    def __init__(self, config: ModelConfig, options: SegmentOptions) -> None:
        super().__init__(config, options)
        self.segment = options.segment_tokens
        self.span = 2 * self.segment

    def reach(self, positions: Tensor) -> Tensor:
        return positions.minimum(positions % self.segment + self.segment)

    def flops_per_token(self, context: int) -> float:
        S = self.segment
        # A segment and a half, of which the first segment's tokens lack one.
        read = context / 2 if context < S else 1.5 * S - S * S / context
        return self.projection_flops() + 4 * self.config.width * read
