"""A moving average of weights, on whatever shards of them a rank's optimizer holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

EMA = "ema"  # its kind among the tensors that a checkpoint has of a parameter


class WeightAverage:
    """An exponential moving average of the tensors that an optimizer updates, in their dtype and beside them.

    After update t = 1, 2, .. of a tensor w, average = d average + (1 - d) w with d = min(decay, t / (t + 9)): so the
    start of a training is soon forgotten, however close to 1 the decay is.
    """

    def __init__(self, decay: float, owners: Sequence[Tensor]) -> None:
        self._decay = decay
        self._owners = {id(owner): owner for owner in owners}
        self._averages = {key: owner.detach().clone() for key, owner in self._owners.items()}
        self._updates = dict.fromkeys(self._owners, 0)

    def of(self, owner: Tensor) -> Tensor:
        """Return the average of a tensor."""
        return self._averages[id(owner)]

    @torch.no_grad()
    def update(self, owners: Iterable[Tensor]) -> None:
        """Take tensors into their averages, after the optimizer has updated them."""
        for owner in owners:
            t = self._updates[id(owner)] = self._updates[id(owner)] + 1
            self.of(owner).lerp_(owner.detach(), 1 - min(self._decay, t / (t + 9)))

    @torch.no_grad()
    def restart(self) -> None:
        """Let the averages be the tensors themselves, as before the first update."""
        for key, owner in self._owners.items():
            self._averages[key].copy_(owner.detach())
        self.updates = 0

    @property
    def updates(self) -> int:
        """How many updates the averages are of; to be set where they were written by `of`."""
        return max(self._updates.values())

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates = dict.fromkeys(self._updates, updates)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the averages and the tensors; doing it twice changes nothing."""
        for key, owner in self._owners.items():
            weights = owner.detach().clone()
            owner.detach().copy_(self._averages[key])
            self._averages[key].copy_(weights)
