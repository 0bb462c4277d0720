"""From a config's prepared folders to batches on the device, made while the step before them runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.config import RunConfig, batch_plan
from tostlm.data import TRAIN, VALIDATION, ContextStage, Loader, NumpyBatch, TokenSet
from tostlm.launch import RankInfo
from tostlm.model import LMState

AHEAD = 2  # batches


class Batch(NamedTuple):
    """A rank's `tostlm.data.NumpyBatch`, or a piece of each of its sequences, as tensors: [sequences, tokens] each."""

    inputs: Tensor
    targets: Tensor
    resets: Tensor | None
    group: dist.ProcessGroup | None = None  # whose ranks have the other pieces

    @classmethod
    def of(cls, batch: NumpyBatch, piece: int = 0, pieces: int = 1) -> Batch:
        """The whole batch, or one of several equal pieces of each sequence's tokens."""
        tokens = batch.inputs.shape[1] // pieces
        own = np.s_[:, piece * tokens : (piece + 1) * tokens]

        def tensor(part: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(part[own]))

        resets = None if batch.resets is None else tensor(batch.resets)
        return cls(tensor(batch.inputs), tensor(batch.targets), resets)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same rows with each tensor changed."""
        resets = None if self.resets is None else change(self.resets)
        return Batch(change(self.inputs), change(self.targets), resets, self.group)

    @property
    def context(self) -> int:
        """Tokens of a whole sequence."""
        return self.inputs.shape[1] * (1 if self.group is None else self.group.size())

    def loss(self, lm: Any, state: LMState | None = None) -> tuple[Tensor, LMState]:
        """The mean loss in nats of an LM, or of an engine around one, and the state after the whole sequences."""
        return lm(self.inputs, state, targets=self.targets, document_start_mask=self.resets, group=self.group)

    def split(self, parts: int) -> list[Batch]:
        """Equal parts of the sequences."""
        inputs, targets = self.inputs.chunk(parts), self.targets.chunk(parts)
        resets = [None] * parts if self.resets is None else self.resets.chunk(parts)
        return [Batch(*part, self.group) for part in zip(inputs, targets, resets, strict=True)]


def training_loader(config: RunConfig) -> Loader:
    """What the run trains on.

    Raises:
        UserError: a set is damaged or has no window of some stage.
    """
    tokens = config.train.batch_tokens
    stages = [ContextStage(step, context, tokens // context) for step, context in config.data.stages]
    return _loader(config, TRAIN, stages, stateful=config.data.stateful)


def validation_loader(config: RunConfig, world_size: int) -> Loader:
    """What the run is evaluated on, in batches that are one pass of each group of ranks.

    Raises:
        UserError: a set is damaged or has no window of `data.context_tokens`.
    """
    sequences = batch_plan(config, world_size).micro_sequences * world_size // config.train.context_parallel_size
    return _loader(config, VALIDATION, [ContextStage(0, config.data.context_tokens, sequences)], stateful=False)


def _loader(config: RunConfig, split: str, stages: list[ContextStage], stateful: bool) -> Loader:
    sets = [(TokenSet(folder, split), weight) for folder, weight in config.data.sets]
    return Loader(
        sets,
        stages,
        config.seed,
        reset_at=sets[0][0].manifest.eos_id if config.data.reset_at_documents else None,
        within_documents=config.data.within_documents,
        stateful=stateful,
    )


def prefetch(
    loader: Loader, steps: range, ranks: RankInfo, device: torch.device, group: dist.ProcessGroup | None = None
) -> Generator[Batch]:
    """This rank's batches of `steps` on its device, made `AHEAD` of their use by a thread that ends with the iterator.

    The ranks of `group` get the same sequences, each its piece of their tokens.

    Raises:
        UserError: a shard is damaged.
    """

    on_cuda = device.type == "cuda"
    piece, pieces = (0, 1) if group is None else (group.rank(), group.size())

    def make(step: int) -> Batch:
        batch = loader.batch(step, ranks.rank // pieces, ranks.world_size // pieces)
        rows = Batch.of(batch, piece, pieces)._replace(group=group)
        return rows.each(Tensor.pin_memory) if on_cuda else rows

    def choose_device() -> None:  # pinning memory would otherwise start CUDA on the first device too
        if on_cuda:
            torch.cuda.set_device(device)

    thread = ThreadPoolExecutor(1, "feed", choose_device)
    try:
        made = deque(thread.submit(make, step) for step in steps[:AHEAD])
        for step in steps:
            rows = made.popleft().result()
            if step + AHEAD in steps:
                made.append(thread.submit(make, step + AHEAD))
            yield rows.each(lambda part: part.to(device, non_blocking=True))
    finally:
        thread.shutdown(cancel_futures=True)
