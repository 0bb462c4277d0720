"""Causal softmax attention, whose keys and values grow with the context: GPT-2's mixer, and stronger forms of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.rotary import rotate
from tostlm.model.parts.short_conv import ShortConv, check_taps
from tostlm.model.positions import SequencePositions
from tostlm.parallel import heads_to_sequence, sequence_to_heads
from tostlm.shapes import Float

RMS_EPS = 1e-6  # of the norms of queries and keys


@dataclass(frozen=True)
class SoftmaxOptions(MixerOptions):
    """Options of softmax attention. Its defaults are GPT-2's."""

    mixer: Literal["softmax"] = "softmax"
    rotary_base: float | None = None  # rotary positions with this base, such as 10000; None has none
    qk_norm: bool = False  # queries and keys of one length, and a learned scale a head
    short_conv: int = 0  # taps of the convolutions of queries, keys and values; 0 for none
    gate: Literal["none", "output"] = "none"  # the output times sigmoid(G x)

    def __post_init__(self) -> None:
        if self.rotary_base is not None and self.rotary_base <= 1:
            raise ValueError(f"rotary_base {self.rotary_base} must be above 1")
        check_taps(self.short_conv)


class KVState(NamedTuple):
    """Keys and values of the tokens before, of this rank's heads where ranks share a context."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, D]
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], queries, keys and values before their convolution


class SoftmaxAttention(Mixer):
    """Multi-head softmax attention without biases; by its options rotary, normalized, convolved and gated.

    Context-parallel ranks exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).
    """

    options_class = SoftmaxOptions
    state_class = KVState
    constant_state = False
    context_parallel = "heads"
    needs_attention_mask = True
    no_weight_decay = frozenset({"conv.weight"})

    def __init__(self, config: ModelConfig, options: SoftmaxOptions) -> None:
        super().__init__(config, options)
        C, H = config.width, config.heads
        if options.rotary_base is not None and C // H % 2:
            raise ValueError(f"heads of {C // H} channels cannot have rotary positions; their number must be even")
        self.in_proj = nn.Linear(C, 3 * C, bias=False)  # queries, keys, values
        self.conv = ShortConv(3 * C, options.short_conv, silu=False) if options.short_conv else None
        self.qk_scale = nn.Parameter(torch.empty(H)) if options.qk_norm else None
        self.gate_proj = nn.Linear(C, C, bias=False) if options.gate == "output" else None
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: KVState | None
    ) -> tuple[Float[Tensor, "B T C"], KVState]:
        B, T, C = x.shape
        H = self.config.heads
        qkv = self.in_proj(x)
        tail = qkv.new_zeros(B, 0, 3 * C)
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if state is None else state.tail, positions)
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))
        q, k = self._placed(q, k, positions)
        if positions.group is not None:
            q, k, v = heads_to_sequence(torch.stack([q, k, v]), positions.group)
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        mask = positions.attention_mask
        is_causal = mask is None and q.shape[2] > 1  # a single token attends to all before it
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # [B, H, T, D]
        if positions.group is not None:
            y = sequence_to_heads(y, positions.group)
        y = y.transpose(1, 2).reshape(B, T, C)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        return self.out_proj(y), KVState(k, v, tail)

    def _placed(self, q: Tensor, k: Tensor, positions: SequencePositions) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, H, T, D] normalized and turned by their positions, where the options say so."""
        if self.qk_scale is not None:
            wide, narrow = torch.promote_types(q.dtype, torch.float32), q.dtype
            q, k = (F.rms_norm(x.to(wide), x.shape[-1:], eps=RMS_EPS) for x in (q, k))
            q, k = (q * self.qk_scale.to(wide)[:, None, None]).to(narrow), k.to(narrow)
        if self.options.rotary_base is not None:
            q, k = (rotate(x, positions.positions, self.options.rotary_base) for x in (q, k))
        return q, k

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.in_proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        if self.qk_scale is not None:
            self.qk_scale.fill_(1.0)
        if self.gate_proj is not None:
            self.gate_proj.weight.normal_(0, self.config.init_std, generator=generator)

    def flops_per_token(self, context: int) -> float:
        C = self.config.width
        matrices = 4 + (self.gate_proj is not None)
        taps = 3 * C * int(self.options.short_conv)
        return (
            2.0 * (matrices * C * C + taps) + 4 * C * context / 2
        )  # scores and values over half the context on average

    def state_bytes(self, context: int) -> int:
        tail = 4 * 3 * self.config.width * max(0, int(self.options.short_conv) - 1)
        return 2 * context * self.config.width * self.in_proj.weight.element_size() + tail
