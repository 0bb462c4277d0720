"""What the model remembers of each row's document from one step to the next: truncated backpropagation through time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.config import RunConfig
from tostlm.launch import RankInfo
from tostlm.model import LMState
from tostlm.tssa import State


class RecurrentState:
    """The states of this rank's rows, in the `parts` that its passes are made of.

    There is none before the first window, and never one without data.stateful. Ranks that share their sequences
    hold the same.
    """

    def __init__(self, config: RunConfig, parts: int, ranks: RankInfo) -> None:
        self._on, self._pieces, self._ranks = config.data.stateful, config.train.context_parallel_size, ranks
        self._states: list[LMState | None] = [None] * parts

    def __getitem__(self, part: int) -> LMState | None:
        return self._states[part]

    def keep(self, part: int, state: LMState) -> None:
        """Hand a state on to the next step, without its history."""
        if not self._on:
            return
        layers = tuple(layer.detach() for layer in state.layers if isinstance(layer, State))
        self._states[part] = LMState(0, layers)  # without positions nothing counts the tokens before

    def forget(self) -> None:
        """Begin anew: after a step that was no good, and where a run goes back."""
        self._states = [None] * len(self._states)

    def gather(self) -> dict[str, Tensor]:
        """The states of all rows of all ranks, in the rows' order: `LAYER/SUM` [rows, ...]. Every rank must call."""
        states = [state for state in self._states if state is not None]
        whole = {}
        for layer, parts in enumerate(zip(*(state.layers for state in states), strict=True)):
            for name, sums in zip(State._fields, zip(*parts, strict=True), strict=True):
                own = torch.cat(sums)
                every = [torch.empty_like(own) for _ in range(self._ranks.world_size)]
                dist.all_gather(every, own)
                whole[f"{layer}/{name}"] = torch.cat(every[:: self._pieces]).cpu()
        return whole

    def restore(self, whole: Mapping[str, Tensor], device: torch.device) -> None:
        """Take this rank's rows of what `gather` gave, on any number of ranks."""
        self.forget()
        if not whole:
            return
        groups, group = self._ranks.world_size // self._pieces, self._ranks.rank // self._pieces
        own = {name: sums.chunk(groups)[group].to(device).chunk(len(self._states)) for name, sums in whole.items()}
        layers = len(whole) // len(State._fields)
        for part in range(len(self._states)):
            sums = [[own[f"{layer}/{name}"][part] for name in State._fields] for layer in range(layers)]
            self._states[part] = LMState(0, tuple(State(*layer) for layer in sums))
