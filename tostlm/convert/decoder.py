"""A model as a function of tensors alone, as runtimes take it: of tokens, their positions and a state.

Shapes: B sequences, T tokens, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tostlm.model import LM
from tostlm.model.lm import LMState
from tostlm.model.mixers.softmax import KVState
from tostlm.model.positions import SequencePositions


class Decoder(nn.Module):
    """Reads the next tokens of sequences, whose state is a list of tensors without names of their own.

    Tensors of a state that never have elements are not among them.

    Args:
        state: what the model remembers of some tokens, for its tensors' names, types and order.
    """

    def __init__(self, lm: LM, state: LMState) -> None:
        super().__init__()
        self.lm = lm
        self._kinds = [type(layer) for layer in state.layers]
        tensors = [tensor for layer in state.layers for tensor in layer]
        self._empty = [None if tensor.numel() else tensor.shape[1:] for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        fields = [f"layer{layer}.{field}" for layer, kind in enumerate(self._kinds) for field in kind._fields]
        self.names = [name for name, empty in zip(fields, self._empty, strict=True) if empty is None]

    def flatten(self, state: LMState) -> list[Tensor]:
        """Return the tensors of a state in the order of `names`."""
        return self._flatten(state.layers)

    def _flatten(self, layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        tensors = [tensor for layer in layers for tensor in layer]
        return [tensor for tensor, empty in zip(tensors, self._empty, strict=True) if empty is None]

    def forward(self, tokens: Tensor, positions: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits [B, V] after tokens [B, T], and the state after them.

        Args:
            positions: [T] int64, of the tokens in their documents: the first is how many tokens were read before.
            state: tensors [B, ...], in the order of `names`.
        """
        given = iter(state)
        empty = (
            next(given) if shape is None else tokens.new_zeros(len(tokens), *shape, dtype=dtype)
            for shape, dtype in zip(self._empty, self._dtypes, strict=True)
        )
        layers = tuple(kind(*(next(empty) for _ in kind._fields)) for kind in self._kinds)
        x, after = self.lm.mix(self.lm.embed(tokens), self._places(tokens, positions, layers), layers)
        return self.lm.logits(x[:, -1:])[:, 0], self._flatten(after)

    def _places(self, tokens: Tensor, positions: Tensor, layers: Sequence[object]) -> SequencePositions:
        T = tokens.shape[1]
        first = torch.zeros_like(tokens[:, :1])  # the only document's
        mask = None
        for layer in layers:
            if isinstance(layer, KVState):
                keys = torch.arange(layer.keys.shape[2] + T, device=tokens.device)
                mask = (keys <= positions[:, None])[None, None]  # [1, 1, T, keys]
                break
        return SequencePositions(0, T, None, first, first, positions, None, mask, None)
