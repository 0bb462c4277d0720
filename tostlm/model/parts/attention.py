"""What softmax attention has in common, whichever tokens it reads: its projections, positions and output.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.projections import FusedLinear, project_tokens, project_values, reset_linear
from tostlm.model.parts.rotary import rotate
from tostlm.model.parts.short_conv import ShortConv, check_taps, tail_bytes
from tostlm.model.positions import SequencePositions

RMS_EPS = 1e-6  # of the norms of queries and keys


@dataclass(frozen=True)
class AttentionOptions(MixerOptions):
    """Options of softmax attention. Its defaults are GPT-2's."""

    rotary_base: float | None = None  # rotary positions with this base, such as 10000; None has none
    qk_norm: bool = False  # queries and keys of one length, and a learned scale a head
    short_conv: int = 0  # taps of the convolutions of queries, keys and values; 0 for none
    gate: Literal["none", "output"] = "none"  # the output times sigmoid(G x)

    def __post_init__(self) -> None:
        if self.rotary_base is not None and self.rotary_base <= 1:
            raise ValueError(f"rotary_base {self.rotary_base} must be above 1")
        check_taps(self.short_conv)


class Attention(Mixer):
    """A base of mixers: queries, keys and values of tokens, and what becomes of what the heads have read."""

    options: AttentionOptions
    has_values = True
    has_biases = True
    no_weight_decay = frozenset({"conv.weight"})

    def __init__(self, config: ModelConfig, options: AttentionOptions) -> None:
        super().__init__(config, options)
        C, H = config.width, config.heads
        if options.rotary_base is not None and C // H % 2:
            raise ValueError(f"heads of {C // H} channels cannot have rotary positions; their number must be even")
        self.in_proj = FusedLinear(C, C, parts=3, heads=H, bias=config.bias)  # queries, keys, values
        self.conv = ShortConv(3 * C, options.short_conv, silu=False) if options.short_conv else None
        self.qk_scale = nn.Parameter(torch.empty(H)) if options.qk_norm else None
        self.gate_proj = nn.Linear(C, C, bias=False) if options.gate == "output" else None
        self.out_proj = nn.Linear(C, C, bias=config.bias)

    def values(self, x: Tensor) -> Tensor:
        return project_values(self.in_proj, x)

    def project(
        self, x: Tensor, positions: SequencePositions, tail: Tensor | None, added_values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, H, T, D] of tokens x [B, T, C], and the tail of the convolution."""
        B, T, C = x.shape
        H = self.config.heads
        qkv, tail = project_tokens(self.in_proj, self.conv, x, tail, positions, added_values)
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))
        return *self._placed(q, k, positions), v, tail

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Return [B, T, C] of what the heads read, y [B, H, T, D], and the tokens x [B, T, C]."""
        y = y.transpose(1, 2).reshape(x.shape)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        out: Tensor = self.out_proj(y)
        return out

    def _placed(self, q: Tensor, k: Tensor, positions: SequencePositions) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, H, T, D] normalized and turned by their positions, where the options say so."""
        if self.qk_scale is not None:
            wide, narrow = torch.promote_types(q.dtype, torch.float32), q.dtype
            q, k = (F.rms_norm(x.to(wide), x.shape[-1:], eps=RMS_EPS) for x in (q, k))
            q, k = (q * self.qk_scale.to(wide)[:, None, None]).to(narrow), k.to(narrow)
        if self.options.rotary_base is not None:
            q, k = rotate(torch.stack([q, k]), positions.positions, self.options.rotary_base)
        return q, k

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        reset_linear(self.in_proj, self.config.init_std, generator)
        reset_linear(self.out_proj, self.config.residual_init_std, generator)
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        if self.qk_scale is not None:
            self.qk_scale.fill_(1.0)
        if self.gate_proj is not None:
            self.gate_proj.weight.normal_(0, self.config.init_std, generator=generator)

    def projection_flops(self) -> float:
        """Return the floating-point operations of the forward pass per token beside reading other tokens."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    def tail_bytes(self) -> int:
        """Return the bytes of one sequence's tail."""
        return tail_bytes(self.conv)
