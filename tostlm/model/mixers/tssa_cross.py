"""TSSA with cross statistics: the whole second moment of keys and values that each head has seen, at constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.forgetting import Forgetting
from tostlm.model.parts.matrix_state import CHUNK, sum_outer_products
from tostlm.model.parts.short_conv import ShortConv, check_taps
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

EPS = 1e-6  # of the norms


@dataclass(frozen=True)
class TSSACrossOptions(MixerOptions):
    """Options of TSSA with cross statistics."""

    mixer: Literal["tssa_cross"] = "tssa_cross"
    forgetting: Literal["none", "ladder", "selective"] = "selective"
    # Half-lives of the first head and of the last, geometric between: where "selective" starts.
    halflife_tokens: tuple[float, float] = (4.0, 4096.0)
    short_conv: int = 4  # taps of the convolutions of keys, queries and values, SiLU after them; 0 for neither
    gate: Literal["none", "output"] = "output"

    def __post_init__(self) -> None:
        if not 0 < self.halflife_tokens[0] <= self.halflife_tokens[1]:
            raise ValueError(f"halflife_tokens {list(self.halflife_tokens)} must be positive, shortest first")
        check_taps(self.short_conv)


class TSSACrossState(NamedTuple):
    """What a layer remembers: the cross statistics, and the tokens that the convolutions still reach."""

    cross: Tensor  # [B, H, D, D], the running sum of b k v^T
    tail: Tensor  # [B, max(0, short_conv - 1), 3C], keys, queries and values before their convolution


class TSSACross(Mixer):
    """S_t = a_t S_{t-1} + b_t k_t v_t^T in each head, y_t = RMSNorm(S_t^T q_t) sigmoid(G x_t).

    k, q and v are SiLU of short convolutions of projections of x, k of length 1; b = sigmoid(W x) is how much a head
    writes, a how much it keeps. TSSA remembers the diagonal of S alone, where k = v = w.
    """

    options_class = TSSACrossOptions
    state_class = TSSACrossState
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"conv.weight"})

    def __init__(self, config: ModelConfig, options: TSSACrossOptions) -> None:
        super().__init__(config, options)
        C, H = config.width, config.heads
        self.in_proj = nn.Linear(C, 3 * C, bias=False)  # keys, queries, values
        self.conv = ShortConv(3 * C, options.short_conv, silu=True) if options.short_conv else None
        self.forgetting = Forgetting(options.forgetting, C, H, options.halflife_tokens)
        self.write_proj = nn.Linear(C, H)
        self.norm = nn.Parameter(torch.empty(C))
        self.gate_proj = nn.Linear(C, C, bias=False) if options.gate == "output" else None
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: TSSACrossState | None
    ) -> tuple[Float[Tensor, "B T C"], TSSACrossState]:
        B, T, C = x.shape
        H = self.config.heads
        kqv, write = self.in_proj(x), self.write_proj(x)
        tail = kqv.new_zeros(B, 0, 3 * C)
        if self.conv is not None:
            kqv, tail = self.conv(kqv, None if state is None else state.tail, positions)
        log_decays = self.forgetting(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            k, q, v = kqv.to(wide).view(B, T, 3, H, C // H).unbind(2)
            k = F.normalize(k, dim=-1, eps=EPS) * write.to(wide).sigmoid()[..., None]
            before = None if state is None else state.cross
            y, cross = sum_outer_products(q, k, v, log_decays, positions, before)
            y = F.rms_norm(y, y.shape[-1:], eps=EPS).flatten(2) * self.norm.to(wide)
        y = y.to(kqv.dtype)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        return self.out_proj(y), TSSACrossState(cross, tail)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        std = self.config.init_std
        for proj in (self.in_proj, self.write_proj, self.gate_proj):
            if proj is not None:
                proj.weight.normal_(0, std, generator=generator)
        self.write_proj.bias.zero_()
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)
        self.norm.fill_(1.0)
        self.forgetting.reset_parameters(std, generator)
        if self.conv is not None:
            self.conv.reset_parameters(generator)

    def flops_per_token(self, context: int) -> float:
        C, H = self.config.width, self.config.heads
        D = C // H
        matrices = sum(p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight"))
        taps = 3 * C * int(self.options.short_conv)
        # In a head: scores and values of half a chunk's pairs on average, the state's update and its reading.
        return 2.0 * (matrices + taps + H * (2 * D * min(CHUNK, context) / 2 + 2 * D * D))

    def state_bytes(self, context: int) -> int:
        C, H = self.config.width, self.config.heads
        return 4 * (C * (C // H) + 3 * C * max(0, int(self.options.short_conv) - 1))
