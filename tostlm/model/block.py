"""A block of the LM: a token mixer and an MLP, each a branch beside the residual stream.

Shapes: B sequences, T tokens, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.mixers.base import MIXERS, MixerState
from tostlm.model.parts.projections import FusedLinear, reset_linear
from tostlm.model.positions import SequencePositions

RMS_EPS = 1e-6


class Bottom(NamedTuple):
    """What later blocks read of the bottom of the model, each [B, T, C], or None where the config has none."""

    embedded: Tensor | None  # what the first block starts from
    values: Tensor | None  # of the first block's mixer


class Block(nn.Module):
    """A token mixer and an MLP, each normalized before and scaled after (LayerScale), added to the residual stream.

    Sources: value residual, arXiv 2410.17897; the skip from the embedding, modded-nanogpt.
    """

    VALUES_GAIN = 0.5  # at initialization

    def __init__(self, config: ModelConfig, options: MixerOptions, layer: int) -> None:
        super().__init__()
        self.config = config
        if config.bias and not MIXERS[options.mixer].has_biases:
            raise ValueError(f"model.bias: {options.mixer} layers have no biases; set it to false")
        later, takes_values = layer > 0, MIXERS[options.mixer].has_values
        if config.value_residual and not later and not takes_values:
            raise ValueError(f"model.value_residual: the first layer's mixer, {options.mixer}, has no values")
        self.skip = nn.Parameter(torch.empty(2)) if config.embed_skip and later else None
        self.values_gain = nn.Parameter(torch.empty(1)) if config.value_residual and later and takes_values else None
        self.norm_mixer = create_norm(config)
        self.mixer = MIXERS[options.mixer](config, options)
        self.scale_mixer = _gain(config)
        self.norm_mlp = create_norm(config)
        self.mlp = MLP(config)
        self.scale_mlp = _gain(config)

    def forward(
        self, x: Tensor, positions: SequencePositions, state: MixerState | None, bottom: Bottom
    ) -> tuple[Tensor, MixerState]:
        if self.skip is not None:
            assert bottom.embedded is not None
            x = self.skip[0] * x + self.skip[1] * bottom.embedded
        added: tuple[Tensor, ...] = ()
        if self.values_gain is not None:
            assert bottom.values is not None
            added = ((self.values_gain * bottom.values).to(bottom.values.dtype),)
        y, state = self.mixer(self.norm_mixer(x), positions, state, *added)
        x = x + (y if self.scale_mixer is None else self.scale_mixer * y)
        y = self.mlp(self.norm_mlp(x))
        return x + (y if self.scale_mlp is None else self.scale_mlp * y), state

    def values(self, x: Tensor) -> Tensor:
        """Return the values [B, T, C] that the mixer, which has some, would make of the block's input x."""
        return self.mixer.values(self.norm_mixer(x))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        if self.skip is not None:
            self.skip.copy_(torch.tensor([1.0, 0.0]))
        if self.values_gain is not None:
            self.values_gain.fill_(self.VALUES_GAIN)
        for norm in (self.norm_mixer, self.norm_mlp):
            reset_norm(norm)
        for scale, start in ((self.scale_mixer, self.mixer.layer_scale), (self.scale_mlp, None)):
            if scale is not None:
                assert self.config.layer_scale is not None
                scale.fill_(self.config.layer_scale if start is None else start)
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
        self.in_proj = FusedLinear(config.width, inside, parts=2 if config.mlp == "swiglu" else 1, bias=config.bias)
        self.out_proj = nn.Linear(inside, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.config.mlp == "swiglu":
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        elif self.config.mlp == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.config.mlp == "gelu_tanh" else "none")
        y: Tensor = self.out_proj(x)
        return y

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place."""
        reset_linear(self.in_proj, self.config.init_std, generator)
        reset_linear(self.out_proj, self.config.residual_init_std, generator)

    def flops_per_token(self) -> float:
        """Return the floating-point operations of the forward pass per token."""
        return 2.0 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())


def create_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return a norm over the channels as the config has it."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.width, bias=config.bias)
    return nn.RMSNorm(config.width, eps=RMS_EPS)


def reset_norm(norm: nn.Module) -> None:
    """Initialize a norm in place."""
    for name, parameter in norm.named_parameters():
        parameter.fill_(1.0 if name == "weight" else 0.0)


def _gain(config: ModelConfig) -> nn.Parameter | None:
    return None if config.layer_scale is None else nn.Parameter(torch.empty(config.width))
