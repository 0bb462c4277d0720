"""The causal language model: one forward for training, evaluation, prefill and one-token decoding.

Shapes: B sequences, T tokens, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tostlm.model.config import ModelConfig
from tostlm.model.loss import mean_cross_entropy
from tostlm.model.mixers import TSSA, MixerState, SequencePositions, SoftmaxAttention


class LMState(NamedTuple):
    """What the model remembers of a context: how many tokens it read, and each layer's memory of them.

    `document` [B, 1] is the number of each sequence's last reset among the tokens read; None where there never was one.
    """

    tokens: int
    layers: tuple[MixerState, ...]
    document: Tensor | None = None

    def select(self, rows: Tensor) -> LMState:
        """The states of the sequences `rows` [B'] (beam search reorders and repeats sequences so)."""
        document = None if self.document is None else self.document.index_select(0, rows)
        return LMState(self.tokens, tuple(layer.select(rows) for layer in self.layers), document)

    @property
    def nbytes(self) -> int:
        """Bytes of memory the context takes."""
        layers = sum(x.nbytes for layer in self.layers for x in layer)
        return layers if self.document is None else layers + self.document.nbytes


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

    def forward(self, x: Tensor, place: SequencePositions, state: MixerState | None) -> tuple[Tensor, MixerState]:
        y, state = self.mixer(self.norm_mixer(x), place, state)
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
    predictions, those not `tostlm.model.IGNORE`, computed without holding T x V logits. `reset` [B, T] bool is True at
    the first token of each document packed into the context: nothing before it has any influence from there on, and
    positions start again from 0.

    With `group` the context is split over a process group: every rank calls with its own consecutive tokens, targets
    and resets, all of one shape, and gets logits, or the mean loss, of its own. `state` is the one before the first
    rank's tokens and the result the one after the last rank's, the same on all ranks but for softmax layers, where each
    rank keeps its heads. Gradients are this rank's share: summed over the ranks they are those of the ranks' summed
    losses.

    With `activation_checkpointing_every` set to n, every n-th block keeps its input alone for the backward pass, and
    is computed again there.

    Raises:
        ValueError: the context, or with resets a document in it, outgrows `config.positions`; `reset` is of another
            shape than the tokens; softmax layers' heads do not split over the ranks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing_every: int | None = None
        self.embed = nn.Embedding(config.vocab_size, config.width)  # the output projection too
        self.positions = nn.Embedding(config.positions, config.width) if config.positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(
        self,
        tokens: Tensor,
        state: LMState | None = None,
        targets: Tensor | None = None,
        reset: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, LMState]:
        x, state = self.hidden(tokens, state, reset, group)  # [B, T, C]
        if targets is None:
            return F.linear(x, self.embed.weight), state
        return mean_cross_entropy(x[:, -targets.shape[1] :], self.embed.weight, targets), state

    def hidden(
        self,
        tokens: Tensor,
        state: LMState | None = None,
        reset: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, LMState]:
        """The normed residual stream [B, T, C] that the output projection reads, and the state after the tokens."""
        if reset is not None and reset.shape != tokens.shape:
            raise ValueError(f"reset has shape {tuple(reset.shape)}; it must be the tokens', {tuple(tokens.shape)}")
        past, document = (state.tokens, state.document) if state else (0, None)
        place = SequencePositions.of(tokens, past, document, reset, "softmax" in self.config.mixers, group)
        self._check_length(place)
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(place.positions)
        layers = []
        for layer, block in enumerate(self.blocks):
            before = state.layers[layer] if state else None
            if self.activation_checkpointing_every and (layer + 1) % self.activation_checkpointing_every == 0:
                x, after = checkpoint(block, x, place, before, use_reentrant=False, preserve_rng_state=False)
            else:
                x, after = block(x, place, before)
            layers.append(after)
        return self.norm(x), LMState(place.end, tuple(layers), place.last)

    def _check_length(self, place: SequencePositions) -> None:
        limit = self.config.positions
        if limit is None or place.end <= limit:  # documents are no longer than the context, whatever they are
            return
        length = place.longest
        if length > limit:
            kind = "context" if place.first is None else "document"
            raise ValueError(f"a {kind} of {length} tokens is longer than the model's {limit} positions")
