"""What one rank reads: batches from the prepared data, prefetched to its device, and the state carried between them.

Shapes: B sequences, T tokens of each on this rank. With context parallelism the ranks of a group read the same
sequences, and each holds T = context / group size of their tokens.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.config import BatchPlan, RunConfig, batch_plan
from tostlm.data import TRAIN, VALIDATION, BatchStage, Loader, NumpyBatch, Tokenizer, TokenSet, common_tokenizer
from tostlm.launch import RankInfo
from tostlm.model import IGNORE, LM, LMState, state_tensors
from tostlm.train.held_out import HeldOut, open_held_out

PREFETCHED_BATCHES = 2


class Batch(NamedTuple):
    """The tensors of one rank's batch. The ranks of a `group` hold slices of the tokens of the same sequences."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]: the token after each input, or IGNORE
    document_start_mask: Tensor | None  # bool [B, T]: True where the model forgets all earlier tokens
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_numpy(cls, batch: NumpyBatch, group: dist.ProcessGroup | None = None) -> Batch:
        """Return a batch as tensors; with a `group`, only this rank's slice of each sequence."""
        mask = None if batch.document_start_mask is None else torch.from_numpy(batch.document_start_mask)
        whole = cls(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), mask, group)
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        return whole.map(lambda tensor: tensor.chunk(size, dim=1)[rank].contiguous())

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` applied to each tensor."""
        mask = None if self.document_start_mask is None else function(self.document_start_mask)
        return Batch(function(self.inputs), function(self.targets), mask, self.group)

    def split(self, count: int) -> list[Batch]:
        """Return `count` micro-batches of equally many sequences, in order."""
        inputs, targets = self.inputs.chunk(count), self.targets.chunk(count)
        masks = [None] * count if self.document_start_mask is None else self.document_start_mask.chunk(count)
        return [Batch(*part, self.group) for part in zip(inputs, targets, masks, strict=True)]


def micro_batches(batch: Batch, config: RunConfig) -> list[Batch]:
    """Return the parts of a rank's batch that it passes through the model one by one, as many as the step needs."""
    return batch.split(batch.inputs.numel() // config.train.micro_batch_tokens)


class RunData(NamedTuple):
    """Everything a run reads, opened once, and how its ranks share a batch."""

    tokenizer: Tokenizer
    training: Loader
    validation: Loader  # of held-out sequences, one a step
    held_out: list[HeldOut]  # what an evaluation reads of them, and at other contexts
    plan: BatchPlan


def open_data(config: RunConfig, world_size: int) -> RunData:
    """Open the prepared folders of a run.

    Raises:
        UserError: the ranks cannot share the batch equally, a folder is damaged, the folders have different
            tokenizers, or a split has no sequence of `data.context_tokens` or `train.eval_contexts`.
    """
    plan = batch_plan(config, world_size)
    tokenizer = common_tokenizer(config.data.folders, config.model.vocab_size)
    stages = [BatchStage(step, context, tokens // context) for step, context, tokens in config.stages]
    training = _open_loader(config, TRAIN, stages)
    validation = _open_loader(config, VALIDATION, [BatchStage(0, config.data.context_tokens, 1)])
    return RunData(tokenizer, training, validation, open_held_out(config, validation, plan), plan)


def _open_loader(config: RunConfig, split: str, stages: list[BatchStage]) -> Loader:
    data = config.data
    sets = [(TokenSet(folder, split), weight) for folder, weight in data.sets]
    eos_id = sets[0][0].manifest.eos_id if data.reset_at_documents else None
    stateful = data.stateful and split == TRAIN
    return Loader(sets, stages, config.seed, eos_id=eos_id, within_documents=data.within_documents, stateful=stateful)


class RankBatches:
    """The training and held-out batches of one rank, or of its context-parallel `group`, prefetched to its device."""

    def __init__(
        self, data: RunData, ranks: RankInfo, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        size = 1 if group is None else group.size()
        self._data, self._device, self._group = data, device, group
        self._groups, self._group_index = ranks.world_size // size, ranks.rank // size

    def training(self, first_step: int) -> Generator[Batch]:
        """Yield the training batches from a step on, without end.

        Raises:
            UserError: a shard is damaged.
        """

        def read(step: int) -> Batch:
            return Batch.from_numpy(self._data.training.batch(step, self._group_index, self._groups), self._group)

        return prefetch(read, range(first_step, sys.maxsize), self._device)

    def held_out(self, part: HeldOut) -> Generator[Batch]:
        """Yield this rank's share of some held-out sequences, as batches of `part.rows`.

        They are the same for any number of ranks, and every rank yields equally many batches, because the ranks run a
        forward pass together at ZeRO stage 3. Where the sequences do not divide equally, batches are filled up with
        sequences whose targets are all IGNORE.

        Raises:
            UserError: a shard is damaged.
        """

        def read(index: int) -> Batch:
            first = (index * self._groups + self._group_index) * part.rows
            found = [part.read(min(n, part.sequences - 1)) for n in range(first, first + part.rows)]
            inputs, targets, masks = zip(*found, strict=True)
            mask = None if masks[0] is None else np.concatenate(masks)
            batch = NumpyBatch(np.concatenate(inputs), np.concatenate(targets), mask)
            batch.targets[max(0, part.sequences - first) :] = IGNORE
            return Batch.from_numpy(batch, self._group)

        return prefetch(read, range(-(-part.sequences // (part.rows * self._groups))), self._device)


def prefetch(read: Callable[[int], Batch], steps: range, device: torch.device) -> Generator[Batch]:
    """Yield `read(step)` for each of `steps`, moved to the device.

    A thread reads up to `PREFETCHED_BATCHES` ahead of their use; it ends with the generator.
    """

    def read_pinned(step: int) -> Batch:
        batch = read(step)
        if device.type != "cuda":
            return batch
        torch.cuda.set_device(device)  # pinning memory would otherwise start CUDA on the first device too
        return batch.map(Tensor.pin_memory)

    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(thread.submit(read_pinned, step) for step in steps[:PREFETCHED_BATCHES])
        for step in steps:
            batch = pending.popleft().result()
            if step + PREFETCHED_BATCHES in steps:
                pending.append(thread.submit(read_pinned, step + PREFETCHED_BATCHES))
            yield batch.map(lambda tensor: tensor.to(device, non_blocking=True))
    finally:
        thread.shutdown(cancel_futures=True)


class RecurrentState:
    """The model's state after each sequence of a step, by micro-batch, which the next step starts from.

    Gradients stop there: this is truncated backpropagation through time. There are no states before the first step, and
    never any without `data.stateful`. The ranks of a context-parallel group hold the same ones.
    """

    def __init__(self, config: RunConfig, micro_batches: int, ranks: RankInfo) -> None:
        self._enabled, self._group_size, self._ranks = config.data.stateful, config.train.context_parallel_size, ranks
        self.states: list[LMState | None] = [None] * micro_batches

    def store(self, micro_batch: int, state: LMState) -> None:
        """Store the state after a micro-batch for the next step, detached from its graph."""
        if self._enabled:
            # A stateful model has no position table, so the number of earlier tokens is not used.
            self.states[micro_batch] = LMState(0, state.detach().layers)

    def reset(self) -> None:
        """Forget all states, as after a step that was skipped."""
        self.states = [None] * len(self.states)

    def gather(self) -> dict[str, Tensor]:
        """Return the states of all ranks on the host, for a checkpoint. Every rank must call this.

        They are tensors [sequences of a step, ...] by LAYER/FIELD, in the order of the sequences; {} if there are none.
        """
        micro_batches = [state_tensors(state) for state in self.states if state is not None]
        gathered = {}
        for name in micro_batches[0] if micro_batches else ():
            local = torch.cat([tensors[name] for tensors in micro_batches])
            of_ranks = [torch.empty_like(local) for _ in range(self._ranks.world_size)]
            dist.all_gather(of_ranks, local)
            gathered[name] = torch.cat(of_ranks[:: self._group_size]).cpu()
        return gathered

    def restore(self, gathered: Mapping[str, Tensor], lm: LM, device: torch.device) -> None:
        """Take this rank's sequences from what `gather` returned, perhaps on another number of ranks; {} for none."""
        groups, group = self._ranks.world_size // self._group_size, self._ranks.rank // self._group_size
        count = len(self.states)
        local = {name: tensor.chunk(groups)[group].to(device).chunk(count) for name, tensor in gathered.items()}
        for index in range(count) if local else ():
            self.states[index] = lm.state_from_tensors({name: parts[index] for name, parts in local.items()})
