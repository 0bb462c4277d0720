"""Mamba-2: a selective state space of scalar decays, which is a matrix of memory in each head.

Shapes: B sequences, T tokens, C channels = H heads x D.
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
from tostlm.model.parts.matrix_state import ChunkDecays, add_outer_products, outer_products_flops
from tostlm.model.parts.short_conv import ShortConv, check_taps, convolved, tail_bytes
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

NORM_EPS = 1e-5
RATES = (1.0, 16.0)  # where exp(A) starts, uniform
STEPS = (0.001, 0.1)  # where dt starts, uniform in its logarithm


@dataclass(frozen=True)
class Mamba2Options(MixerOptions):
    """Options of Mamba-2."""

    mixer: Literal["mamba2"] = "mamba2"
    short_conv: int = 4  # taps of the convolution of inputs, keys and queries, SiLU after it; 0 for neither

    def __post_init__(self) -> None:
        check_taps(self.short_conv)


class Mamba2State(NamedTuple):
    """What a layer remembers: the state space's state, and the tokens that the convolution still reaches."""

    memory: Tensor  # [B, H, D, D]
    tail: Tensor  # [B, max(0, short_conv - 1), C + 2D], inputs, keys and queries before their convolution


class Mamba2(Mixer):
    """S_t = exp(-dt_t exp(A)) S_{t-1} + dt_t k_t v_t^T in each head, read as y_t = S_t^T q_t + skip v_t.

    Of x_t are projected z and v of C channels, k and q of D, the same for all heads (the paper's B and C, one group),
    and a dt = softplus(W x + c) a head. v, k and q are convolved, SiLU after it. The result is
    W_o RMSNorm(y silu(z)), over all channels.

    The authors' release has twice as many channels inside as the model's width; here they are as many, and the state
    of a head is as wide as the head, so that a state is C D numbers. Its convolution has a bias, starts at random and
    decays.

    Source: Mamba-2 (arXiv 2405.21060).
    """

    options_class = Mamba2Options
    state_class = Mamba2State
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"conv.weight"})

    def __init__(self, config: ModelConfig, options: Mamba2Options) -> None:
        super().__init__(config, options)
        C, H = config.width, config.heads
        self.inputs = C + 2 * (C // H)  # channels of v, k and q
        self.in_proj = nn.Linear(C, C + self.inputs + H, bias=False)  # z, v, k, q, dt
        self.conv = ShortConv(self.inputs, options.short_conv, silu=True) if options.short_conv else None
        self.step_offset = nn.Parameter(torch.empty(H))
        self.log_rate = nn.Parameter(torch.empty(H))
        self.skip = nn.Parameter(torch.empty(H))
        self.norm = nn.Parameter(torch.empty(C))
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: Mamba2State | None
    ) -> tuple[Float[Tensor, "B T C"], Mamba2State]:
        memory, tail = (None, None) if state is None else state
        C, H = self.config.width, self.config.heads
        D, wide = C // H, torch.promote_types(x.dtype, torch.float32)
        z, vkq, pace = self.in_proj(x).split([C, self.inputs, H], -1)
        vkq, tail = convolved(self.conv, vkq, tail, positions)
        with torch.autocast(x.device.type, enabled=False):
            v, k, q = vkq.to(wide).split([C, D, D], -1)
            v = v.unflatten(-1, (H, D))
            steps = F.softplus(pace.to(wide) + self.step_offset.to(wide))  # [B, T, H]
            log_decays = -steps * self.log_rate.to(wide).exp()
            written = v * steps[..., None]
            decays = ChunkDecays.build(log_decays, positions, *x.shape[:2])
            if memory is None:
                memory = v.new_zeros(x.shape[0], H, D, D)
            y, memory = add_outer_products(q[:, :, None], k[:, :, None], written, decays, positions, memory)
            y = (y + v * self.skip.to(wide)[:, None]).flatten(2) * F.silu(z.to(wide))
            y = F.rms_norm(y, y.shape[-1:], eps=NORM_EPS) * self.norm.to(wide)
        return self.out_proj(y.to(x.dtype)), Mamba2State(memory, tail)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.in_proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        steps = self.step_offset.uniform_(*map(math.log, STEPS), generator=generator).exp_()
        self.step_offset.copy_(torch.log(torch.expm1(steps)))  # softplus of it is the step
        self.log_rate.uniform_(*RATES, generator=generator).log_()
        self.skip.fill_(1.0)
        self.norm.fill_(1.0)

    def flops_per_token(self, context: int) -> float:
        C, H = self.config.width, self.config.heads
        memory = outer_products_flops(C, H, context, scored_heads=1)
        return 2.0 * (self.in_proj.weight.numel() + self.out_proj.weight.numel()) + memory

    def state_bytes(self, context: int) -> int:
        return 4 * self.config.width * (self.config.width // self.config.heads) + tail_bytes(self.conv)
