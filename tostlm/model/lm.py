"""The causal language model: one forward for training, evaluation, prefill and one-token decoding.

Shapes: B sequences, T tokens, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.model.loss import mean_cross_entropy
from tostlm.model.mixers import TSSA, MixerState, SoftmaxAttention


class LMState(NamedTuple):
    """What the model remembers of a context: how many tokens it read, and each layer's memory of them."""

    tokens: int
    layers: tuple[MixerState, ...]

    def select(self, rows: Tensor) -> LMState:
        """The states of the sequences `rows` [B'] (beam search reorders and repeats sequences so)."""
        return LMState(self.tokens, tuple(layer.select(rows) for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of memory the context takes."""
        return sum(x.nbytes for layer in self.layers for x in layer)


class Block(nn.Module):
    """A token mixer and an MLP, each normed before and scaled after (LayerScale), added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_mixer = nn.LayerNorm(config.width, bias=False)
        self.mixer = TSSA(config) if config.mixer(layer) == "tssa" else SoftmaxAttention(config)
        self.scale_mixer = nn.Parameter(torch.empty(config.width))
        self.norm_mlp = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config.width)
        self.scale_mlp = nn.Parameter(torch.empty(config.width))

    def forward(self, x: Tensor, start: int, state: MixerState | None) -> tuple[Tensor, MixerState]:
        y, state = self.mixer(self.norm_mixer(x), start, state)
        x = x + self.scale_mixer * y
        return x + self.scale_mlp * self.mlp(self.norm_mlp(x)), state


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 4 * width, bias=False)
        self.out_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.gelu(self.in_proj(x)))


class LM(nn.Module):
    """A causal language model of any mixer.

    `logits, state = lm(tokens)` reads tokens [B, T]; `lm(next_tokens, state)` goes on from there, and equals one call
    on the whole. With `targets` [B, S] the first result is the mean cross-entropy in nats of the last S tokens'
    predictions, those not `tostlm.model.IGNORE`, computed without holding T x V logits.

    Raises:
        ValueError: the context outgrows `config.positions`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)  # the output projection too
        self.positions = nn.Embedding(config.positions, config.width) if config.positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(
        self, tokens: Tensor, state: LMState | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        x, state = self.hidden(tokens, state)  # [B, T, C]
        if targets is None:
            return F.linear(x, self.embed.weight), state
        return mean_cross_entropy(x[:, -targets.shape[1] :], self.embed.weight, targets), state

    def hidden(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        """The normed residual stream [B, T, C] that the output projection reads, and the state after the tokens."""
        start = state.tokens if state else 0
        end = start + tokens.shape[1]
        if self.config.positions is not None and end > self.config.positions:
            raise ValueError(f"a context of {end} tokens is longer than the model's {self.config.positions} positions")
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(start, end, device=tokens.device))
        layers = []
        for layer, block in enumerate(self.blocks):
            x, after = block(x, start, state.layers[layer] if state else None)
            layers.append(after)
        return self.norm(x), LMState(end, tuple(layers))
