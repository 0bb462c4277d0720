"""What causal TSSA remembers of the tokens before: three running sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """The running sums of one layer: 2C + H numbers a sequence, whatever the context.

    They are kept in float64, because a sum over a million tokens loses its newest terms in anything narrower.
    """

    energy: Tensor  # [B, C], sum of w^2
    mass: Tensor  # [B, H], sum of Pi
    weighted: Tensor  # [B, C], sum of Pi w^2

    @classmethod
    def zeros(cls, batch: int, width: int, heads: int, device: torch.device | str = "cpu") -> State:
        """The state before the first token of a document."""

        def empty(size: int) -> Tensor:
            return torch.zeros(batch, size, dtype=torch.float64, device=device)

        return cls(empty(width), empty(heads), empty(width))

    def select(self, rows: Tensor) -> State:
        """The states of the sequences `rows` [B'] (beam search reorders and repeats sequences so)."""
        return State(*(x.index_select(0, rows) for x in self))
