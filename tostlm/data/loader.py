"""Batches of windows, a pure function of (seed, step, rank, world size).

Every set is cut into windows of `context` tokens. Which set a sample is of, and which window of it, are seeded
pseudorandom permutations of numbers, another one each cycle and each epoch, computed and never stored: seeking to a
step costs nothing, and the windows of a step do not depend on how many ranks share them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tostlm.data.order import LONGEST_CYCLE, Blend, permuted
from tostlm.data.shards import load_tokenizer
from tostlm.data.tokenizer import Tokenizer
from tostlm.data.windows import DocumentWindows, StreamWindows, Tokens
from tostlm.errors import UserError
from tostlm.files import distinct_names


class Stage(NamedTuple):
    """From step `first_step` on, steps of `sequences` windows of `context` tokens over all ranks."""

    first_step: int
    context: int
    sequences: int


class Batch(NamedTuple):
    """What one rank reads at one step: [sequences / world, context] each."""

    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64, the tokens after the inputs
    resets: np.ndarray | None  # bool: inputs that the model forgets everything before


class Loader:
    """Windows of several sets of tokens, each with a weight; the stages are in order, the first from step 0.

    `reset_at` is the document end at which the model forgets. The end that precedes a document counts as its first
    input, as it does in generation, so the model reads each document as if it stood alone. `within_documents` reads
    of every stage's context only the documents that fill it.

    Raises:
        UserError: a set has no window of a stage's context, or a weight too small to be read.
    """

    def __init__(
        self,
        sets: Sequence[tuple[Tokens, float]],
        stages: Sequence[Stage],
        seed: int,
        *,
        reset_at: int | None = None,
        within_documents: bool = False,
    ) -> None:
        self._stages, self._seed, self._reset_at = stages, seed, reset_at
        self._blend = Blend([weight for _, weight in sets])
        for (tokens, weight), count in zip(sets, self._blend.counts, strict=True):
            if not count:
                raise UserError(
                    f"the weight {weight} of {tokens.folder} is less than one sample in {LONGEST_CYCLE}; raise it or "
                    "leave the set out"
                )
        cut = DocumentWindows if within_documents else StreamWindows
        contexts = {stage.context for stage in stages}
        of_context = {context: [cut(tokens, context) for tokens, _ in sets] for context in contexts}
        self._windows = [of_context[stage.context] for stage in stages]
        self._names = distinct_names([tokens.folder for tokens, _ in sets])

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """What `rank` of `world` ranks reads at a step; all of them together read the same whatever their number."""
        number = bisect_right(self._stages, step, key=lambda stage: stage.first_step) - 1
        stage = self._stages[number]
        share = stage.sequences // world
        first = (step - stage.first_step) * stage.sequences + rank * share
        rows = np.stack([self._row(number, sample) for sample in range(first, first + share)])
        inputs = rows[:, :-1]
        return Batch(inputs, rows[:, 1:], None if self._reset_at is None else inputs == self._reset_at)

    def _row(self, stage: int, sample: int) -> np.ndarray:
        key = f"{self._seed}/{stage}"
        chosen, index = self._blend.pick(sample, key)
        windows = self._windows[stage][chosen]
        epoch, index = divmod(index, windows.count)
        return windows.row(permuted(index, windows.count, f"{key}/{chosen}/{epoch}"))

    def epochs(self, step: int) -> dict[str, float]:
        """How often the windows of each set, by name, have been read after `step` steps, summed over the stages."""
        done = dict.fromkeys(self._names, 0.0)
        ends = [*(stage.first_step for stage in self._stages[1:]), step]
        for stage, end, windows in zip(self._stages, ends, self._windows, strict=True):
            samples = max(0, min(step, end) - stage.first_step) * stage.sequences
            for name, count, cut in zip(self._names, self._blend.counts, windows, strict=True):
                done[name] += samples * count / self._blend.length / cut.count
        return done

    def steps_within(self, tokens: int) -> int:
        """Steps of the last stage that read at most `tokens` tokens, and no set more than once; one at least."""
        stage, counts = self._stages[-1], zip(self._blend.counts, self._windows[-1], strict=True)
        once = min(cut.count * self._blend.length // count for count, cut in counts)
        return max(1, min(tokens // stage.context, once) // stage.sequences)


def common_tokenizer(folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer that all of some prepared folders were made with.

    Raises:
        UserError: they were not made with the same.
    """
    first, *others = folders
    tokenizer = load_tokenizer(first)
    for folder in others:
        if load_tokenizer(folder).sha256 != tokenizer.sha256:
            raise UserError(f"{first} and {folder} were prepared with different tokenizers; prepare one of them again")
    return tokenizer
