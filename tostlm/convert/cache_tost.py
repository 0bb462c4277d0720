"""What the exported model has read: its state as a cache of transformers, and batches that are padded.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tostlm.model.lm import LMState


class TostCache(Cache):  # type: ignore[misc, unused-ignore]  # it has no types
    """The state of the model after a context, of constant size for mixers of constant state; None before any token.

    It can be copied and reordered over sequences, and cannot forget its last tokens.
    """

    def __init__(self, state: LMState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the context takes."""
        return self.state.nbytes if self.state else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.tokens if self.state else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx.to(self.state.layers[0][0].device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            sequences = self.state.layers[0][0].shape[0]
            self.reorder_cache(torch.arange(sequences).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Do nothing where no token is to be forgotten.

        Raises:
            ValueError: some are.
        """
        if max_length < 0 or max_length < self.get_seq_length():
            raise ValueError(
                f"a state of {self.get_seq_length()} tokens cannot be cut to {max_length}; read the tokens again"
            )

    def reset(self) -> None:
        self.state = None


class Padding(NamedTuple):
    """How a padded batch is read: each row's padding first, as a document of its own that nothing follows from."""

    order: Tensor  # [B, T] int64, the places of the tokens in the order that they are read
    places: (
        Tensor  # [B, T] int64, in that order of what each token's logits are: of padding, the last token's before it
    )
    starts: Tensor  # [B, T] bool, in that order: where each row's own tokens start

    @classmethod
    def of(cls, mask: Tensor) -> Padding | None:
        """Return it for an attention mask [B, T], 0 for padding; None without any."""
        if mask.dim() != 2:
            raise ValueError(f"attention_mask has {mask.dim()} dimensions; it must be [sequences, tokens]")
        real = mask != 0
        if bool(real.all()):
            return None
        padding, T = (~real).sum(1, keepdim=True), mask.shape[1]
        order = real.int().argsort(dim=1, stable=True)
        places = (padding + (real.cumsum(1) - 1).clamp_min(0)).clamp_max(T - 1)
        return cls(order, places, torch.arange(T, device=mask.device) == padding)
