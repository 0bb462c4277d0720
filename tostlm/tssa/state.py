"""The state of causal TSSA: three running sums over the tokens before."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """The running sums of one layer: 2C + H numbers per sequence, whatever the context.

    They are kept in float64, because a sum over a million tokens loses its newest terms in anything narrower.
    """

    energy: Tensor  # [B, C], sum of w^2
    mass: Tensor  # [B, H], sum of Pi
    weighted: Tensor  # [B, C], sum of Pi w^2

    @classmethod
    def zeros(cls, batch: int, width: int, heads: int, device: torch.device | str = "cpu") -> State:
        """Return the state before the first token of a document."""
        sizes = (width, heads, width)
        return cls(*(torch.zeros(batch, size, dtype=torch.float64, device=device) for size in sizes))

    def repeat(self, times: int) -> State:
        """Return each state `times` times in a row, [B times, ...], to continue one prefix in several ways."""
        return State(*(x.repeat_interleave(times, 0) for x in self))

    def detach(self) -> State:
        """Return the same numbers without their autograd history, as truncated backpropagation through time needs."""
        return State(*(x.detach() for x in self))

    def to(self, device: torch.device | str) -> State:
        """Return the state on another device."""
        return State(*(x.to(device) for x in self))

    @property
    def nbytes(self) -> int:
        """Bytes of memory: 8 (2C + H) per sequence."""
        return sum(x.nbytes for x in self)

    def save(self, path: Path) -> None:
        """Write the state to a file."""
        torch.save(self._asdict(), path)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a file that `save` wrote, onto the CPU; nothing but tensors is unpickled."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))

    def select(self, rows: Tensor) -> State:
        """Return the states of the sequences `rows` [B'], as beam search reorders and repeats them."""
        return State(*(x.index_select(0, rows) for x in self))
