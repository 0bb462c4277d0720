"""The causal language model: one forward pass for training, evaluation, prefill and one-token decoding.

Shapes: B sequences, T tokens, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tostlm.model.block import Block, Bottom, create_norm, reset_norm
from tostlm.model.config import ModelConfig
from tostlm.model.loss import mean_cross_entropy, softcapped
from tostlm.model.mixers.base import MixerState
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float, Int


class LMState(NamedTuple):
    """What the model remembers of a context: the number of tokens read, and the state of each layer's mixer.

    `document_start` [B, 1] is the number of the first token of the document that each sequence is in; None where no
    document started after token 0.
    """

    tokens: int
    layers: tuple[MixerState, ...]
    document_start: Tensor | None = None

    def select(self, rows: Int[Tensor, " rows"]) -> LMState:
        """Return the states of the sequences `rows` [B'], as beam search reorders and repeats them."""
        return self._map(lambda x: x.index_select(0, rows))

    def detach(self) -> LMState:
        """Return the same numbers without their autograd history, as truncated backpropagation through time needs."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> LMState:
        layers = tuple(type(layer)(*map(function, layer)) for layer in self.layers)
        return LMState(self.tokens, layers, None if self.document_start is None else function(self.document_start))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the context takes."""
        layers = sum(int(x.nbytes) for layer in self.layers for x in layer)
        return layers if self.document_start is None else layers + self.document_start.nbytes


class LM(nn.Module):
    """A causal language model with a token mixer per layer.

    `logits, state = lm(tokens)` reads tokens [B, T]; `lm(next_tokens, state)` continues from there, and equals one call
    on all tokens.

    Attributes:
        activation_checkpointing_every: with n, every n-th block keeps its input alone for the backward pass and is
            computed again there; None keeps all activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing_every: int | None = None
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.positions = nn.Embedding(config.positions, config.width) if config.positions else None
        self.clamps_positions = False  # beyond learned positions use the last one, instead of raising an error
        self.embed_norm = create_norm(config) if config.embed_norm else None
        blocks = [Block(config, options, layer) for layer, options in enumerate(config.layer_plan)]
        self.blocks: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = create_norm(config)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: LMState | None = None,
        targets: Int[Tensor, "B S"] | None = None,
        document_start_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Float[Tensor, "B T V"] | Float[Tensor, ""], LMState]:
        """Return logits [B, T, V], or with targets the mean loss, and the state after the tokens.

        Args:
            tokens: [B, T] int64.
            state: the state after the tokens before these; None at the start of a context.
            targets: [B, S] int64, S <= T: the first result is then the mean cross-entropy in nats of the predictions at
                the last S tokens, without those whose target is `tostlm.model.IGNORE`. T x V logits are never held.
                In training mode `config.z_loss` is part of it.
            document_start_mask: [B, T] bool, True at the first token of each document packed into the context: from
                there on nothing before it has any influence, and positions start again from 0.
            group: a process group that shares the context. Every rank calls with its own consecutive tokens, targets
                and mask, all of one shape, and gets its own logits or mean loss. `state` is the one before the first
                rank's tokens, and the result the one after the last rank's: the same on every rank, but for mixers
                that split their heads, whose states each rank keeps for its own heads. Gradients are this rank's share:
                summed over the ranks they are those of the summed losses.

        Raises:
            ValueError: the context, or a document in it, is longer than `config.positions`; the mask has another shape
                than the tokens; a mixer's heads do not split over the ranks.
        """
        x, state = self.hidden(tokens, state, document_start_mask, group)  # [B, T, C]
        if targets is None:
            return self.logits(x), state
        softcap, z_loss = self.config.logit_softcap, self.config.z_loss if self.training else 0.0
        return mean_cross_entropy(x[:, -targets.shape[1] :], self.output_weight, targets, softcap, z_loss), state

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        state: LMState | None = None,
        document_start_mask: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        embeddings: Float[Tensor, "B T C"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], LMState]:
        """Return the normalized residual stream [B, T, C], which the output projection reads, and the state.

        Arguments and errors as in `forward`; `embeddings` [B, T, C] are read in place of those of the tokens.
        """
        if document_start_mask is not None and document_start_mask.shape != tokens.shape:
            raise ValueError(
                f"document_start_mask has shape {tuple(document_start_mask.shape)}; it must have the tokens' shape, "
                f"{tuple(tokens.shape)}"
            )
        past, document_start = (state.tokens, state.document_start) if state else (0, None)
        with_spans = any(block.mixer.needs_spans for block in self.blocks)
        positions = SequencePositions.build(tokens, past, document_start, document_start_mask, with_spans, group)
        self._check_length(positions)
        x = self.embed(tokens) if embeddings is None else embeddings
        x, layers = self.mix(x, positions, state.layers if state else None)
        return x, LMState(positions.end, layers, positions.last_document_start)

    def mix(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, layers: tuple[MixerState, ...] | None
    ) -> tuple[Float[Tensor, "B T C"], tuple[MixerState, ...]]:
        """Return the normalized residual stream of embedded tokens, and the layers' states after them.

        Args:
            positions: where the tokens are.
            layers: the states after the tokens before; None at the start of a context.
        """
        if self.positions is not None:
            x = x + self.positions(positions.within(self.positions.num_embeddings))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        bottom = Bottom(
            x if self.config.embed_skip else None, self.blocks[0].values(x) if self.config.value_residual else None
        )
        after = []
        for layer, block in enumerate(self.blocks):
            before = layers[layer] if layers else None
            if self.activation_checkpointing_every and (layer + 1) % self.activation_checkpointing_every == 0:
                x, state = checkpoint(
                    block, x, positions, before, bottom, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, state = block(x, positions, before, bottom)
            after.append(state)
        return self.norm(x), tuple(after)

    def logits(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T V"]:
        """Return the logits of `hidden`'s residual stream."""
        return softcapped(F.linear(x, self.output_weight), self.config.logit_softcap)

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, C]."""
        return self.embed.weight if self.head is None else self.head.weight

    def _check_length(self, positions: SequencePositions) -> None:
        limit = self.config.positions
        if limit is None or self.clamps_positions or positions.end <= limit:  # no document is longer than the context
            return
        length = positions.longest_document
        if length > limit:
            kind = "context" if positions.document_start is None else "document"
            raise ValueError(f"a {kind} of {length} tokens is longer than the model's {limit} positions")

    def parts(self) -> list[nn.Module]:
        """Return the modules that hold the parameters, each one once, in the order of `named_parameters`."""
        parts = (self.embed, self.head, self.positions, self.embed_norm, *self.blocks, self.norm)
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def reset_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """Initialize the parameters of one of `parts` in place."""
        if isinstance(part, Block):
            part.reset_parameters(generator)
        elif part in (self.norm, self.embed_norm):
            reset_norm(part)
        elif part is self.head:
            part.weight.zero_()
        else:
            part.weight.normal_(0, self.config.init_std, generator=generator)  # type: ignore[operator]

    def state_from_tensors(self, tensors: Mapping[str, Tensor]) -> LMState:
        """Build a state from `state_tensors`' result, or from some sequences of it."""
        layers = [
            block.mixer.state_class(*(tensors[f"{layer}/{field}"] for field in block.mixer.state_class._fields))
            for layer, block in enumerate(self.blocks)
        ]
        return LMState(0, tuple(layers))


def state_tensors(state: LMState) -> dict[str, Tensor]:
    """Return the tensors [B, ...] of a state's layers by name, LAYER/FIELD, for storing them."""
    return {
        f"{layer}/{field}": tensor
        for layer, fields in enumerate(state.layers)
        for field, tensor in fields._asdict().items()
    }
