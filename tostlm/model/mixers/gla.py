"""Gated linear attention: a matrix of memory in each head, of which each token decays each channel by a gate.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.config import MAX_SIZE, MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.channel_decays import add_decaying_outer_products
from tostlm.model.parts.gated_output import GatedOutput
from tostlm.model.parts.low_rank import LowRank
from tostlm.model.parts.matrix_state import outer_products_flops
from tostlm.model.parts.projections import FusedLinear, project_tokens
from tostlm.model.parts.short_conv import ShortConv, check_taps, tail_bytes
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

EPS = 1e-4  # of the norm of what a head reads, which is little at first: its keys are short


@dataclass(frozen=True)
class GLAOptions(MixerOptions):
    """Options of gated linear attention. Its defaults are the paper's."""

    mixer: Literal["gla"] = "gla"
    gate_rank: int = 16  # channels in the middle of the decays' projection
    gate_temperature: float = 16.0  # decays are sigmoid(.)^(1 / it): the larger, the slower they forget
    short_conv: int = 0  # taps of the convolutions of queries, keys and values, SiLU after them; 0 for neither

    def __post_init__(self) -> None:
        check_taps(self.short_conv)
        if not 1 <= self.gate_rank <= MAX_SIZE:
            raise ValueError(f"gate_rank {self.gate_rank} must be from 1 to {MAX_SIZE}; the paper's is 16")
        if not self.gate_temperature > 0:
            raise ValueError(f"gate_temperature {self.gate_temperature} must be positive; the paper's is 16")


class GLAState(NamedTuple):
    """What a layer remembers: the matrices, and the tokens that the convolutions still reach."""

    memory: Tensor  # [B, H, D, D]
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], queries, keys and values before their convolution


class GLA(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T in each head, read as S_t^T q_t / sqrt(D), normalized a head and gated.

    q, k, v = W x, a_t = sigmoid(W_2 W_1 x + c)^(1 / gate_temperature) for each channel of the keys, and the gate of
    the output is silu(G x).

    The authors' keys and queries have half as many channels as the model's width; here they have as many, so that a
    state is C D numbers. The norm is an RMSNorm, as in their release, with a gain a channel instead of one shared by
    the heads, and its gate has no bias.

    Source: gated linear attention (arXiv 2312.06635).
    """

    options_class = GLAOptions
    state_class = GLAState
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"conv.weight"})

    def __init__(self, config: ModelConfig, options: GLAOptions) -> None:
        super().__init__(config, options)
        C = config.width
        self.in_proj = FusedLinear(C, C, parts=3, heads=config.heads)  # queries, keys, values
        self.conv = ShortConv(3 * C, options.short_conv, silu=True) if options.short_conv else None
        self.decay = LowRank(C, options.gate_rank, inside=None, offset=True)
        self.output = GatedOutput(config, gated=True, silu=True, eps=EPS)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: GLAState | None
    ) -> tuple[Float[Tensor, "B T C"], GLAState]:
        memory, tail = (None, None) if state is None else state
        (B, T, C), H = x.shape, self.config.heads
        D, wide = C // H, torch.promote_types(x.dtype, torch.float32)
        qkv, tail = project_tokens(self.in_proj, self.conv, x, tail, positions)
        log_decays = F.logsigmoid(self.decay(x)) / self.options.gate_temperature
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.to(wide).view(B, T, 3, H, D).unbind(2)
            log_decays = log_decays.unflatten(-1, (H, D))
            y, memory = add_decaying_outer_products(q * D**-0.5, k, v, log_decays, positions, memory)
        return self.output(y, x), GLAState(memory, tail)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        for proj in (self.in_proj, self.decay.down, self.decay.up):
            proj.weight.normal_(0, self.config.init_std, generator=generator)
        assert self.decay.offset is not None
        self.decay.offset.zero_()
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        self.output.reset_parameters(generator)

    def flops_per_token(self, context: int) -> float:
        C, H = self.config.width, self.config.heads
        matrices = (self.in_proj, self.decay.down, self.decay.up)
        memory = outer_products_flops(C, H, context)
        return 2.0 * sum(proj.weight.numel() for proj in matrices) + self.output.flops_per_token() + memory

    def state_bytes(self, context: int) -> int:
        C = self.config.width
        return 4 * C * (C // self.config.heads) + tail_bytes(self.conv)
