"""A block of the LM: a token mixer and an MLP, each a branch beside the residual stream.

Shapes: B sequences, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import MIXERS, MixerState
from tostlm.model.positions import SequencePositions

RMS_EPS = 1e-6


class Block(nn.Module):
    """A token mixer and an MLP, each normalized before and scaled after (LayerScale), added to the residual stream."""

    def __init__(self, config: ModelConfig, options: MixerOptions) -> None:
        super().__init__()
        self.config = config
        self.norm_mixer = create_norm(config)
        self.mixer = MIXERS[options.mixer](config, options)
        self.scale_mixer = _gain(config)
        self.norm_mlp = create_norm(config)
        self.mlp = MLP(config)
        self.scale_mlp = _gain(config)

    def forward(self, x: Tensor, positions: SequencePositions, state: MixerState | None) -> tuple[Tensor, MixerState]:
        y, state = self.mixer(self.norm_mixer(x), positions, state)
        x = x + (y if self.scale_mixer is None else self.scale_mixer * y)
        y = self.mlp(self.norm_mlp(x))
        return x + (y if self.scale_mlp is None else self.scale_mlp * y), state

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        for norm in (self.norm_mixer, self.norm_mlp):
            norm.weight.fill_(1.0)
        for scale in (self.scale_mixer, self.scale_mlp):
            if scale is not None:
                assert self.config.layer_scale is not None
                scale.fill_(self.config.layer_scale)
        self.mixer.reset_parameters(generator)
        self.mlp.reset_parameters(generator)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between; SwiGLU's first is two, of which one gates the other.

    Sources: GELU as GPT-2; ReLU squared, arXiv 2109.08668; SwiGLU, arXiv 2002.05202.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inside = config.mlp_channels
        self.in_proj = nn.Linear(config.width, 2 * inside if config.mlp == "swiglu" else inside, bias=False)
        self.out_proj = nn.Linear(inside, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.config.mlp == "swiglu":
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x) if self.config.mlp == "gelu" else F.relu(x).square()
        y: Tensor = self.out_proj(x)
        return y

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        self.in_proj.weight.normal_(0, self.config.init_std, generator=generator)
        self.out_proj.weight.normal_(0, self.config.residual_init_std, generator=generator)

    def flops_per_token(self) -> float:
        """Return the floating-point operations of the forward pass per token."""
        return 2.0 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())


def create_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return a norm over the channels as the config has it, without a bias."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.width, bias=False)
    return nn.RMSNorm(config.width, eps=RMS_EPS)


def _gain(config: ModelConfig) -> nn.Parameter | None:
    return None if config.layer_scale is None else nn.Parameter(torch.empty(config.width))
