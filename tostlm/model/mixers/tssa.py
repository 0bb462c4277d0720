"""Token statistics self-attention: ToST's mixer, with a state of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import Mixer
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float
from tostlm.tssa import Inputs, State, tssa, tssa_statistics

OPERATOR_FLOPS = 12  # per channel and token, forward: the elementwise steps of the operator


@dataclass(frozen=True)
class TSSAOptions(MixerOptions):
    """Options of TSSA."""

    mixer: Literal["tssa"] = "tssa"
    # Half-lives of the running sums of the first head and of the last, geometric between; None never forgets, which is
    # the paper's operator.
    halflife_tokens: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.halflife_tokens is not None and not 0 < self.halflife_tokens[0] <= self.halflife_tokens[1]:
            raise ValueError(f"halflife_tokens {list(self.halflife_tokens)} must be positive, shortest first")


class TSSA(Mixer):
    """TSSA with one projection in and one out.

    Source: `CausalSelfAttention_TSSA` in the authors' release (arXiv 2412.17810).
    """

    options_class = TSSAOptions
    state_class = State
    constant_state = True
    context_parallel = "sequence"
    no_weight_decay = frozenset({"bias"})

    def __init__(self, config: ModelConfig, options: TSSAOptions) -> None:
        super().__init__(config, options)
        self.in_proj = nn.Linear(config.width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        self.temp = nn.Parameter(torch.empty(config.heads))
        self.bias = nn.Parameter(torch.empty(config.positions, config.heads)) if config.positions else None

    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: State | None
    ) -> tuple[Float[Tensor, "B T C"], State]:
        y, state = tssa(*self._inputs(x, positions), state, group=positions.group)
        return self.out_proj(y), state

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.in_proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)
        self.temp.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def flops_per_token(self, context: int) -> float:
        C = self.config.width
        return 2.0 * 2 * C * C + OPERATOR_FLOPS * C

    def state_bytes(self, context: int) -> int:
        return 8 * (2 * self.config.width + self.config.heads)  # float64

    def statistics(self, x: Tensor, positions: SequencePositions, state: State | None) -> dict[str, Tensor]:
        """Return the membership entropy and the mean gate over the heads, of this rank's tokens.

        See `tostlm.tssa.Statistics` for their definitions.
        """
        found = tssa_statistics(self._inputs(x, positions), state, group=positions.group)
        return {"entropy": found.entropy, "gate": found.gate.mean()}

    def _inputs(self, x: Tensor, positions: SequencePositions) -> Inputs:
        bias = None if self.bias is None else positions.lookup(self.bias)
        rho = None
        if self.options.halflife_tokens is not None:
            first, last = self.options.halflife_tokens
            halflives = first * (last / first) ** torch.linspace(0, 1, self.config.heads, device=x.device)
            rho = 2.0 ** (-1 / halflives)  # [H], what a head keeps of its sums from one token to the next
        return Inputs(self.in_proj(x), self.temp, bias, rho, positions.document_start_mask)
