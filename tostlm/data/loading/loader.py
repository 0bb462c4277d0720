"""Batches of windows as a pure function of (seed, step, rank, world size).

Every token set is divided into windows of `context` tokens. A sample's number decides which set it is of (`Blend`) and
which window of the set it is (`permute`, with another permutation each epoch). No order is stored: starting at any step
costs nothing, and the windows of a step do not depend on how many ranks share them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tostlm.data.loading.sampling import MAX_CYCLE, Blend, permute
from tostlm.data.loading.token_set import TokenSet, Windows
from tostlm.errors import UserError
from tostlm.files import distinct_names


class BatchStage(NamedTuple):
    """The shape of a batch from step `first_step` on. Stages of one context in a row read on in one order."""

    first_step: int
    context: int  # tokens of a window
    sequences: int  # windows of a step, over all ranks


class NumpyBatch(NamedTuple):
    """What one rank reads at one step; all arrays are [sequences / world size, context]."""

    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64: the token after each input
    document_start_mask: np.ndarray | None  # bool: True where the model forgets all earlier tokens


class Loader:
    """Reads the batches of a run from several token sets.

    Args:
        sets: each token set with its relative weight.
        stages: the shapes of the batches, in order; the first is from step 0.
        seed: selects the order of the windows.
        eos_id: the end-of-document token, to return a `document_start_mask` that is True at each of them: the
            end-of-document token before a document is its first input, as in generation. None for no mask.
        within_documents: cut windows from single documents, and so read only documents that fill a stage's context.
        stateful: let each row of a batch continue where the same row of the previous step ended, for a model that
            carries its state from step to step. The mask is then also True at the first token of a set. There must
            be only one stage.

    Raises:
        UserError: a set has no window of a stage's context, or a weight is too small to ever be sampled.
    """

    def __init__(
        self,
        sets: Sequence[tuple[TokenSet, float]],
        stages: Sequence[BatchStage],
        seed: int,
        *,
        eos_id: int | None = None,
        within_documents: bool = False,
        stateful: bool = False,
    ) -> None:
        self._stages, self._seed, self._eos_id, self._stateful = stages, seed, eos_id, stateful
        self._blend = Blend([weight for _, weight in sets], stages[0].sequences if stateful else None)
        for (tokens, weight), count in zip(sets, self._blend.counts, strict=True):
            if not count:
                smallest = f"row of a step's {self._blend.length}" if stateful else f"sample in {MAX_CYCLE}"
                raise UserError(
                    f"the weight {weight} of {tokens.folder} is less than one {smallest}; raise it or leave the set out"
                )
        self._windows = {
            context: [Windows(tokens, context, within_documents) for tokens, _ in sets]
            for context in {stage.context for stage in stages}
        }
        self._orders = _orders(stages)
        self._names = distinct_names([tokens.folder for tokens, _ in sets])

    def batch(self, step: int, rank: int, world_size: int) -> NumpyBatch:
        """Return one rank's part of a step's batch; the parts of all ranks in order are the same for any world size.

        Raises:
            UserError: a shard is damaged.
        """
        number = bisect_right(self._stages, step, key=lambda stage: stage.first_step) - 1
        stage = self._stages[number]
        count = stage.sequences // world_size
        before = self._orders[number].first_sample + (step - stage.first_step) * stage.sequences
        first = before + rank * count
        located = [self._locate(number, sample) for sample in range(first, first + count)]
        rows = np.stack([self._windows[stage.context][chosen][window] for chosen, window in located])
        inputs = rows[:, :-1]
        mask = None if self._eos_id is None else inputs == self._eos_id
        if mask is not None and self._stateful:
            mask[[window == 0 for _, window in located], 0] = True
        return NumpyBatch(inputs, rows[:, 1:], mask)

    def _locate(self, stage: int, sample: int) -> tuple[int, int]:
        """Return the token set of a stage's sample and the number of the window in it."""
        counts = [len(windows) for windows in self._windows[self._stages[stage].context]]
        if self._stateful:
            return self._blend.locate_in_rows(sample, counts)
        key = f"{self._seed}/{self._orders[stage].number}"
        chosen, index = self._blend.locate(sample, key)
        epoch, index = divmod(index, counts[chosen])
        return chosen, permute(index, counts[chosen], f"{key}/{chosen}/{epoch}")

    def set_name(self, sample: int) -> str:
        """Return the name of the token set that a sample of the first stage is of."""
        return self._names[self._locate(0, sample)[0]]

    def epochs(self, step: int) -> dict[str, float]:
        """Return how many times the windows of each set have been read after `step` steps, by the set's name."""
        totals = dict.fromkeys(self._names, 0.0)
        ends = [*(stage.first_step for stage in self._stages[1:]), step]
        for stage, end in zip(self._stages, ends, strict=True):
            samples = max(0, min(step, end) - stage.first_step) * stage.sequences
            for name, count, windows in zip(self._names, self._blend.counts, self._windows[stage.context], strict=True):
                totals[name] += samples * count / self._blend.length / len(windows)
        return totals

    def steps_within(self, tokens: int) -> int:
        """Return how many steps of the last stage read at most `tokens` tokens and no window twice; at least 1."""
        stage = self._stages[-1]
        counts = zip(self._blend.counts, self._windows[stage.context], strict=True)
        one_epoch = min(len(windows) * self._blend.length // count for count, windows in counts)
        return max(1, min(tokens // stage.context, one_epoch) // stage.sequences)


class _Order(NamedTuple):
    """Where a stage's samples are taken from: which of the orders of all samples, and from where in it on."""

    number: int
    first_sample: int


def _orders(stages: Sequence[BatchStage]) -> list[_Order]:
    orders = [_Order(0, 0)]
    for number, (before, stage) in enumerate(pairwise(stages), 1):
        goes_on = before.context == stage.context
        read = orders[-1].first_sample + (stage.first_step - before.first_step) * before.sequences
        orders.append(_Order(orders[-1].number, read) if goes_on else _Order(number, 0))
    return orders
