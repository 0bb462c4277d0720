"""What the heads have read, on its way back into the residual stream.

Shapes: B sequences, T tokens, C channels = H heads x D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig

# Of the norm, where keys have length 1. A head reads next to nothing where its query meets no key, as may be at a
# context's first token, and the gradient through the norm of so short a vector is 1 / its length. This bounds it: in
# one run of a gated delta net the whole gradient rose to 15 times its usual norm with 1e-4, to 4 with this, and to 2
# with 1e-2, which cost 0.01 nats.
EPS = 1e-3


class GatedOutput(nn.Module):
    """W_o (RMSNorm of each head of y, times a gain a channel, times sigmoid(G x)); without `gated` no G.

    With `silu` the last factor is silu(G x); `eps` is the norm's.
    """

    def __init__(self, config: ModelConfig, gated: bool, silu: bool = False, eps: float = EPS) -> None:
        super().__init__()
        C = config.width
        self.config, self.silu, self.eps = config, silu, eps
        self.norm = nn.Parameter(torch.empty(C))
        self.gate_proj = nn.Linear(C, C, bias=False) if gated else None
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return [B, T, C] of what the heads read, y [B, T, H, D], and the tokens x [B, T, C]."""
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(2) * self.norm.to(y.dtype)
        y = y.to(x.dtype)
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            y = y * (F.silu(gate) if self.silu else gate.sigmoid())
        out: Tensor = self.out_proj(y)
        return out

    def mean_gate(self, x: Tensor) -> dict[str, Tensor]:
        """Return the mean of sigmoid(G x) over the tokens x [B, T, C]; nothing without such a gate."""
        if self.gate_proj is None or self.silu:
            return {}
        return {"output_gate": self.gate_proj(x).float().sigmoid().mean()}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        self.norm.fill_(1.0)
        if self.gate_proj is not None:
            self.gate_proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)

    def flops_per_token(self) -> float:
        """Return the floating-point operations of the forward pass per token."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)
