"""RWKV-7's time mixing: a matrix of memory in each head, written by a delta rule with a rate and a decay a channel.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MAX_SIZE, MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.channel_decays import generalized_delta_rule
from tostlm.model.parts.low_rank import LowRank
from tostlm.model.parts.matrix_state import CHUNK
from tostlm.model.parts.neighbours import predecessors
from tostlm.model.parts.projections import FusedLinear
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

FASTEST = math.exp(-0.5)  # -log of the least decay of a token
KEY_EPS = 1e-12  # of the length of the key that is removed
NORM_EPS = 1e-5  # of the norm of a head, for each of its channels
SHIFTED = 6  # mixtures of a token and the one before: of r, w, k, v, a, g
# How much of the token before they start with: 1 - (c / C)^power in channel c. Those of the authors' middle layer.
SHIFT_POWERS = (0.1, 0.45, 0.35, 0.35, 0.45, 0.1)


@dataclass(frozen=True)
class RWKV7Options(MixerOptions):
    """Options of RWKV-7: channels in the middle of its low-rank projections. None is the authors' number."""

    mixer: Literal["rwkv7"] = "rwkv7"
    decay_rank: int | None = None  # 2.5 sqrt(C), to the nearest multiple of 32
    rate_rank: int | None = None  # 2.5 sqrt(C), likewise
    gate_rank: int | None = None  # 5 sqrt(C), likewise

    def __post_init__(self) -> None:
        for name in ("decay_rank", "rate_rank", "gate_rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name} {value} must be from 1 to {MAX_SIZE}, or null for the authors' number")


class RWKV7State(NamedTuple):
    """What a layer remembers: the matrices, and the token before."""

    memory: Tensor  # [B, H, D, D]
    token: Tensor  # [B, 1, C]


class Read(NamedTuple):
    """What a token reads and writes with, in fp32, or float64 where x is: each [B, T, H, D]."""

    r: Tensor
    log_decays: Tensor
    k: Tensor
    v: Tensor
    removed: Tensor  # of length 1
    rates: Tensor  # in (0, 1)


class RWKV7(Mixer):
    """S_t = (diag(w_t) - (a_t p_t) p_t^T) S_{t-1} + k_t v_t^T in each head, read as S_t^T r_t.

    Every projection has a mixture of its own of the token and the one before, x_t + mu (x_{t-1} - x_t). Of these are

        r, k', v = W x        w = exp(-e^(-1/2) sigmoid(c_w + B_w tanh(A_w x)))        a = sigmoid(c_a + B_a A_a x)
        p = k' xi, of length 1 a head        k = k' (1 + (a - 1) alpha)        g = B_g sigmoid(A_g x)
        y_t = W_o (g_t (LayerNorm of each head of S_t^T r_t + (sum_d r_t rho k_t) v_t))

    xi, alpha, rho and the norm's gain and offset are vectors of C.

    In the authors' release later layers mix the first layer's v into theirs; here each layer has its own alone. Their
    mixtures, decays and norms start at values that depend on the layer; here at those of the middle layer, and the
    norm's gain at 1. Their decays c_w learn at twice the rate.

    Source: RWKV-7 (arXiv 2503.14456).
    """

    options_class = RWKV7Options
    state_class = RWKV7State
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset(
        {"shift", *(f"{name}.{part}.weight" for name in ("decay", "rate", "gate") for part in ("down", "up"))}
    )

    def __init__(self, config: ModelConfig, options: RWKV7Options) -> None:
        super().__init__(config, options)
        C = config.width
        self.shift = nn.Parameter(torch.empty(SHIFTED, C))
        self.r_proj = FusedLinear(C, C, heads=config.heads)
        self.k_proj = FusedLinear(C, C, heads=config.heads)
        self.v_proj = FusedLinear(C, C, heads=config.heads)
        self.decay = LowRank(C, options.decay_rank or _rank(2.5, C), inside=torch.tanh, offset=True)
        self.rate = LowRank(C, options.rate_rank or _rank(2.5, C), inside=None, offset=True)
        self.gate = LowRank(C, options.gate_rank or _rank(5.0, C), inside=torch.sigmoid, offset=False)
        self.removed_scale = nn.Parameter(torch.empty(C))  # xi
        self.rate_share = nn.Parameter(torch.empty(C))  # alpha
        self.bonus = nn.Parameter(torch.empty(C))  # rho
        self.norm = nn.Parameter(torch.empty(C))
        self.norm_offset = nn.Parameter(torch.empty(C))
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: RWKV7State | None
    ) -> tuple[Float[Tensor, "B T C"], RWKV7State]:
        memory, token = (None, None) if state is None else state
        shifted, token = self._shifted(x, token, positions)
        tokens, gate = self._project(shifted)
        with torch.autocast(x.device.type, enabled=False):
            r, log_decays, k, v, removed, rates = tokens
            y, memory = generalized_delta_rule(r, removed, rates * removed, k, v, log_decays, positions, memory)
            y = self._normed(y, tokens)
        return self.out_proj(y.to(x.dtype) * gate), RWKV7State(memory, token)

    def _shifted(
        self, x: Tensor, token: Tensor | None, positions: SequencePositions
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the mixtures of x [B, T, C] with the token before, each [B, T, C], and the last token [B, 1, C]."""
        previous, after = predecessors(x, token, positions)
        difference = previous - x
        return tuple(torch.addcmul(x, difference, share) for share in self.shift.to(x.dtype)), after

    def _project(self, shifted: tuple[Tensor, ...]) -> tuple[Read, Tensor]:
        """Return what the mixtures read and write with, and the gate [B, T, C] of the output."""
        x_r, x_w, x_k, x_v, x_a, x_g = shifted
        wide, H = torch.promote_types(x_r.dtype, torch.float32), self.config.heads
        r, k, v = self.r_proj(x_r).to(wide), self.k_proj(x_k).to(wide), self.v_proj(x_v).to(wide)
        log_decays = -FASTEST * self.decay(x_w).sigmoid()
        rates = self.rate(x_a).sigmoid()
        removed = F.normalize((k * self.removed_scale.to(wide)).unflatten(-1, (H, -1)), dim=-1, eps=KEY_EPS)
        share = self.rate_share.to(wide)
        k = k * torch.addcmul(1 - share, rates, share)
        r, log_decays, k, v, rates = (z.unflatten(-1, (H, -1)) for z in (r, log_decays, k, v, rates))
        return Read(r, log_decays, k, v, removed, rates), self.gate(x_g)

    def _normed(self, y: Tensor, tokens: Read) -> Tensor:
        """Return [B, T, C] of what the heads read, y [B, T, H, D], normalized, with the token's own value beside it."""
        D = y.shape[-1]
        bonus = (tokens.r * tokens.k * self.bonus.to(y.dtype).view(-1, D)).sum(-1, keepdim=True)
        y = F.layer_norm(y, (D,), eps=NORM_EPS * D).flatten(2)
        return y * self.norm.to(y.dtype) + self.norm_offset.to(y.dtype) + (bonus * tokens.v).flatten(2)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        C, D, std = self.config.width, self.config.width // self.config.heads, self.config.init_std
        for proj, scale in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            proj.weight.normal_(0, scale * std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)
        for low_rank in (self.decay, self.rate, self.gate):
            low_rank.down.weight.zero_()
            nn.init.orthogonal_(low_rank.up.weight, gain=0.1, generator=generator)
        channel, ramp = torch.arange(C) / C, torch.linspace(0, 1, C)
        within = torch.linspace(-1, 1, D).repeat(C // D) if D > 1 else torch.zeros(C)
        within = within * within.abs()
        self.shift.copy_(1 - channel ** torch.tensor(SHIFT_POWERS)[:, None])
        assert self.decay.offset is not None and self.rate.offset is not None
        self.decay.offset.copy_(-5.5 + 6 * ramp ** (1 + 0.5**0.3) + 2.5 * within)
        self.rate.offset.copy_(-0.19 + 0.3 * within + 0.4 * (ramp - 0.5))
        self.removed_scale.copy_(0.71 - 0.1 * (ramp - 0.5))
        self.rate_share.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.norm.fill_(1.0)
        self.norm_offset.zero_()

    def flops_per_token(self, context: int) -> float:
        C, D, L = self.config.width, self.config.width // self.config.heads, min(CHUNK, context)
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != "shift")
        # Half a chunk's pairs on average: the weights of p and r with k and b, p's values, what is solved (V + D wide),
        # r's readings. Then the chunk's matrix, what is taken from the state, the state's two updates and its reading.
        return 2.0 * matrices + 2.0 * C * L / 2 * 9 + 2.0 * C * D * 5

    def state_bytes(self, context: int) -> int:
        return 4 * self.config.width * (self.config.width // self.config.heads + 1)


def _rank(factor: float, width: int) -> int:
    return max(32, 32 * round(factor * math.sqrt(width) / 32))
