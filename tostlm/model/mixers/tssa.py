"""Token statistics self-attention: ToST's mixer, with a state of constant size, and what makes it read its context.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.parts.forgetting import Forgetting, ForgettingOptions
from tostlm.model.parts.matrix_state import ChunkDecays
from tostlm.model.parts.membership import scale_free_logits
from tostlm.model.parts.projections import FusedLinear, reset_linear
from tostlm.model.parts.running_sums import running_sums
from tostlm.model.parts.short_conv import ShortConv, check_taps, convolved, tail_bytes
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float
from tostlm.tssa import Inputs, State, tssa, tssa_statistics
from tostlm.tssa.reference import EPS, EPS_MASS

OPERATOR_FLOPS = 12  # per channel and token, forward: the elementwise steps of the operator
NORM_EPS = 1e-6


@dataclass(frozen=True)
class TSSAOptions(ForgettingOptions):
    """Options of TSSA. Its defaults are the paper's."""

    mixer: Literal["tssa"] = "tssa"
    short_conv: int = 0  # taps of the convolution of w; 0 for none
    query: Literal["tied", "own"] = "tied"  # what the statistics scale: w, or a projection of its own
    # What a head's share of a token follows from: the paper's sum over channels of w^2 over its energy, or how much of
    # the head's energy the token has, against the mean token's share. The latter does not depend on how much a head
    # remembers, and no channel alone stands in a denominator.
    membership: Literal["literal", "scale_free"] = "literal"
    gate: Literal["none", "output"] = "none"  # the output normalized, and times sigmoid(G x)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taps(self.short_conv)
        if self.membership == "scale_free" and self.forgetting == "none":
            raise ValueError("membership: scale_free goes with forgetting: ladder or selective")

    @property
    def plain(self) -> bool:
        """Whether the operator of `tostlm.tssa` does it all."""
        forgets = self.forgetting == "selective"
        return not forgets and (self.short_conv, self.query, self.membership) == (0, "tied", "literal")


class TSSAState(NamedTuple):
    """The operator's running sums, and what the options add."""

    energy: Tensor  # [B, C] float64, sum of w^2
    mass: Tensor  # [B, H] float64, sum of Pi
    weighted: Tensor  # [B, C] float64, sum of Pi w^2
    remembered: Tensor  # [B, H] float64, sum of 1, in tokens; [B, 0] unless memberships are scale-free
    tail: Tensor  # [B, max(0, short_conv - 1), C], w before its convolution


class TSSA(Mixer):
    """TSSA with one projection in and one out; by its options it forgets selectively, is convolved and gated.

    Source: `CausalSelfAttention_TSSA` in the authors' release (arXiv 2412.17810).
    """

    options_class = TSSAOptions
    state_class = TSSAState
    constant_state = True
    context_parallel = "sequence"
    has_biases = True
    no_weight_decay = frozenset({"bias", "conv.weight"})

    def __init__(self, config: ModelConfig, options: TSSAOptions) -> None:
        super().__init__(config, options)
        C, H = config.width, config.heads
        self.in_proj = FusedLinear(C, C, heads=H, bias=config.bias)
        self.query_proj = FusedLinear(C, C, heads=H) if options.query == "own" else None
        self.conv = ShortConv(C, options.short_conv, silu=False) if options.short_conv else None
        self.forgetting = Forgetting(options, C, H)
        self.norm = nn.Parameter(torch.empty(C)) if options.gate == "output" else None
        self.gate_proj = nn.Linear(C, C, bias=False) if options.gate == "output" else None
        self.out_proj = nn.Linear(C, C, bias=config.bias)
        self.temp = nn.Parameter(torch.empty(H))
        self.bias = nn.Parameter(torch.empty(config.positions, H)) if config.positions else None

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: TSSAState | None
    ) -> tuple[Float[Tensor, "B T C"], TSSAState]:
        before = self._start(x) if state is None else state
        # An exported program has torch's own operators alone.
        if self.options.plain and not torch.compiler.is_exporting():
            y, after = tssa(*self._inputs(self.in_proj(x), positions), State(*before[:3]), group=positions.group)
            return self._output(y, x), TSSAState(*after, *before[3:])
        w, tail = convolved(self.conv, self.in_proj(x), before.tail, positions)
        read = w if self.query_proj is None else self.query_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            y, sums = self._mix(w, read, self.forgetting(x), positions, before)
        return self._output(y.to(x.dtype), x), TSSAState(*sums, tail=tail)

    def _mix(
        self, w: Tensor, read: Tensor, log_decays: Tensor, positions: SequencePositions, before: TSSAState
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return y [B, T, C] and the four sums after it, of w and what is read [B, T, C]."""
        H, wide = self.config.heads, torch.promote_types(w.dtype, torch.float32)
        w, read = (z.to(wide).unflatten(-1, (H, -1)) for z in (w, read))  # [B, T, H, D]
        square, D = w.square(), w.shape[-1]
        decays = ChunkDecays.build(log_decays, positions, *w.shape[:2])
        counts = before.remembered.shape[1] > 0
        own, first = square, before.energy.unflatten(-1, (H, D))
        if counts:
            own, first = F.pad(own, (0, 1), value=1.0), torch.cat([first, before.remembered[..., None]], -1)
        energy, energy_after = running_sums(own, decays, positions, first)
        if counts:
            n = scale_free_logits(square.sum(-1), energy[..., :D].sum(-1), energy[..., D], D)
        else:
            n = (square / energy.clamp_min(EPS)).sum(-1)
        if self.bias is not None:
            n = n + D * positions.lookup(self.bias)
        Pi = torch.softmax(self.temp * n, -1)[..., None]  # [B, T, H, 1]
        first = torch.cat([before.weighted.unflatten(-1, (H, D)), before.mass[..., None]], -1)
        sums, sums_after = running_sums(torch.cat([Pi * square, Pi], -1), decays, positions, first)
        mass = sums[..., D:] + EPS_MASS
        y = -read * Pi * mass / (mass + sums[..., :D])
        remembered = energy_after[..., D] if counts else before.remembered
        after = energy_after[..., :D].flatten(1), sums_after[..., D], sums_after[..., :D].flatten(1), remembered
        return y.flatten(2), after

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            assert self.norm is not None
            wide = torch.promote_types(y.dtype, torch.float32)
            # Over all channels: a norm a head would take out its membership.
            y = (F.rms_norm(y.to(wide), y.shape[-1:], eps=NORM_EPS) * self.norm.to(wide)).to(y.dtype)
            y = y * self.gate_proj(x).sigmoid()
        out: Tensor = self.out_proj(y)
        return out

    def _start(self, x: Tensor) -> TSSAState:
        B, (C, H) = x.shape[0], (self.config.width, self.config.heads)
        kept = 0 if self.conv is None else self.conv.taps - 1
        count = x.new_zeros(B, H if self.options.membership == "scale_free" else 0, dtype=torch.float64)
        tail = x.new_zeros(B, kept, C, dtype=torch.promote_types(x.dtype, torch.float32))
        return TSSAState(*State.zeros(B, C, H, x.device), count, tail)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        std = self.config.init_std
        reset_linear(self.in_proj, std, generator)
        reset_linear(self.out_proj, self.config.residual_init_std, generator)
        self.temp.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()
        if self.norm is not None:
            self.norm.fill_(1.0)
        for proj in (self.query_proj, self.gate_proj):
            if proj is not None:
                proj.weight.normal_(0, std, generator=generator)
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        self.forgetting.reset_parameters(std, generator)

    def flops_per_token(self, context: int) -> float:
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != "bias")
        return 2.0 * matrices + OPERATOR_FLOPS * self.config.width

    def state_bytes(self, context: int) -> int:
        C, H = self.config.width, self.config.heads
        count = H if self.options.membership == "scale_free" else 0
        return 8 * (2 * C + H + count) + tail_bytes(self.conv)

    def statistics(self, x: Tensor, positions: SequencePositions, state: TSSAState | None) -> dict[str, Tensor]:
        """Return the membership entropy and the mean gate over the heads, how far they remember, the output's gate.

        See `tostlm.tssa.Statistics` for the first two. Forms that the operator does not compute have neither.
        """
        others = self.forgetting.horizons(x)
        if self.gate_proj is not None:
            others["output_gate"] = self.gate_proj(x).float().sigmoid().mean()
        if not self.options.plain:
            return others
        before = None if state is None else State(*state[:3])
        found = tssa_statistics(self._inputs(self.in_proj(x), positions), before, group=positions.group)
        return {"entropy": found.entropy, "gate": found.gate.mean(), **others}

    def _inputs(self, w: Tensor, positions: SequencePositions) -> Inputs:
        bias = None if self.bias is None else positions.lookup(self.bias)
        rho = None
        if self.options.forgetting == "ladder":
            # [H], what a head keeps of its sums from one token to the next
            rho = torch.exp(-self.forgetting.rates(w.device))
        return Inputs(w, self.temp, bias, rho, positions.document_start_mask)
