"""How fast each head forgets: not at all, at its own pace, or at a pace that each token chooses.

Shapes: B sequences, T tokens, C channels, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions

Kind = Literal["none", "ladder", "selective"]
HALFLIFE_TOKENS = (4.0, 4096.0)


@dataclass(frozen=True)
class ForgettingOptions(MixerOptions):
    """Options of mixers that forget."""

    forgetting: Kind = "none"
    # Half-lives of the first head and of the last, geometric between: where "selective" starts. None: HALFLIFE_TOKENS.
    halflife_tokens: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.halflife_tokens is None:
            return
        if not 0 < self.halflife_tokens[0] <= self.halflife_tokens[1]:
            raise ValueError(f"halflife_tokens {list(self.halflife_tokens)} must be positive, shortest first")
        if self.forgetting == "none":
            raise ValueError("halflife_tokens goes with forgetting: ladder or selective")


class _WideLinear(nn.Linear):
    """A linear layer that computes in fp32 or wider, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class Forgetting(nn.Module):
    """The log of the factor a_t[h] by which running sums are multiplied before token t.

    - "none": 0.
    - "ladder": -ln 2 / halflife_h, half-lives geometric from the first head's to the last's.
    - "selective": -exp(A_h) softplus(w_h x_t + b_h), learned, which starts near the ladder.

    Source: the discretized decay of Mamba-2 (arXiv 2405.21060) for "selective".
    """

    def __init__(self, options: ForgettingOptions, width: int, heads: int) -> None:
        super().__init__()
        self.kind, self.heads = options.forgetting, heads
        self.halflife_tokens = options.halflife_tokens or HALFLIFE_TOKENS
        if self.kind == "selective":
            self.proj = _WideLinear(width, heads)
            self.log_rate = nn.Parameter(torch.empty(heads))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, H], or [1, 1, H] where all tokens are alike, of tokens x [B, T, C], in fp32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.kind == "selective":
            return -self.log_rate.to(wide).exp() * F.softplus(self.proj(x))
        log_decays = torch.zeros(self.heads, dtype=wide, device=x.device)
        if self.kind == "ladder":
            log_decays = -self.rates(x.device).to(wide)
        return log_decays[None, None]

    def rates(self, device: torch.device | str) -> Tensor:
        """Return ln 2 / half-life of each head, [H]; a single head has the last half-life."""
        first, last = self.halflife_tokens
        exponents = torch.linspace(1, 0, self.heads, dtype=torch.float64, device=device).flip(0)
        return math.log(2) / (first * (last / first) ** exponents)

    def horizons(self, x: Tensor) -> dict[str, Tensor]:
        """Return the tokens after which the head that forgets first, and the last one, keep 1/e of what they had.

        They follow from the mean log of the factors over the tokens x [B, T, C]. Without forgetting there are none.
        """
        if self.kind == "none":
            return {}
        heads = -1 / self(x).mean((0, 1))  # [H]
        return {"shortest_horizon": heads.min(), "longest_horizon": heads.max()}

    @torch.no_grad()
    def reset_parameters(self, init_std: float, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        if self.kind == "selective":
            self.proj.weight.normal_(0, init_std, generator=generator)
            self.proj.bias.copy_(torch.log(torch.expm1(self.rates("cpu"))))  # softplus of it is the rate
            self.log_rate.zero_()
