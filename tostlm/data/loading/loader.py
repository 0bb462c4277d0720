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

from tostlm.data.loading.order import LONGEST_CYCLE, Blend, StreamRows, permuted
from tostlm.data.loading.windows import DocumentWindows, StreamWindows, Tokens
from tostlm.data.shards import load_tokenizer
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import distinct_names


class ContextStage(NamedTuple):
    """From step `first_step` on, steps of `sequences` windows of `context` tokens over all ranks."""

    first_step: int
    context: int
    sequences: int


class NumpyBatch(NamedTuple):
    """What one rank reads at one step: [sequences / world, context] each."""

    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64, the tokens after the inputs
    resets: np.ndarray | None  # bool: inputs that the model forgets everything before


class Loader:
    """Windows of several sets of tokens, each with a weight; the stages are in order, the first from step 0.

    `reset_at` is the document end at which the model forgets. The end that precedes a document counts as its first
    input, as it does in generation, so the model reads each document as if it stood alone. `within_documents` reads
    of every stage's context only the documents that fill it. With `stateful` there is one stage, and each row of a
    step goes on where that row of the step before ended, for a model that carries its state from step to step; the
    first token of a set resets then too.

    Raises:
        UserError: a set has no window of a stage's context, or a weight too small to be read.
    """

    def __init__(
        self,
        sets: Sequence[tuple[Tokens, float]],
        stages: Sequence[ContextStage],
        seed: int,
        *,
        reset_at: int | None = None,
        within_documents: bool = False,
        stateful: bool = False,
    ) -> None:
        self._stages, self._seed, self._reset_at = stages, seed, reset_at
        weights = [weight for _, weight in sets]
        self._lanes = StreamRows(weights, stages[0].sequences) if stateful else None
        self._blend = Blend(weights)
        parts = self._lanes or self._blend
        self._shares = [count / parts.length for count in parts.counts]
        for (tokens, weight), share in zip(sets, self._shares, strict=True):
            if not share:
                of = f"row of a step's {parts.length}" if stateful else f"sample in {LONGEST_CYCLE}"
                raise UserError(
                    f"the weight {weight} of {tokens.folder} is less than one {of}; raise it or leave the set out"
                )
        cut = DocumentWindows if within_documents else StreamWindows
        contexts = {stage.context for stage in stages}
        of_context = {context: [cut(tokens, context) for tokens, _ in sets] for context in contexts}
        self._windows = [of_context[stage.context] for stage in stages]
        self._names = distinct_names([tokens.folder for tokens, _ in sets])

    def batch(self, step: int, rank: int, world_size: int) -> NumpyBatch:
        """What `rank` of `world_size` ranks reads at a step; together they read the same, whatever their number."""
        number = bisect_right(self._stages, step, key=lambda stage: stage.first_step) - 1
        stage = self._stages[number]
        share = stage.sequences // world_size
        first = (step - stage.first_step) * stage.sequences + rank * share
        picks = [self._pick(number, sample) for sample in range(first, first + share)]
        rows = np.stack([self._windows[number][chosen].row(window) for chosen, window in picks])
        inputs = rows[:, :-1]
        resets = None if self._reset_at is None else inputs == self._reset_at
        if resets is not None and self._lanes:
            resets[[window == 0 for _, window in picks], 0] = True
        return NumpyBatch(inputs, rows[:, 1:], resets)

    def _pick(self, stage: int, sample: int) -> tuple[int, int]:
        """Set and window of a sample."""
        if self._lanes:
            return self._lanes.pick(sample, [windows.count for windows in self._windows[stage]])
        key = f"{self._seed}/{stage}"
        chosen, index = self._blend.pick(sample, key)
        count = self._windows[stage][chosen].count
        epoch, index = divmod(index, count)
        return chosen, permuted(index, count, f"{key}/{chosen}/{epoch}")

    def epochs(self, step: int) -> dict[str, float]:
        """How often the windows of each set, by name, have been read after `step` steps, summed over the stages."""
        done = dict.fromkeys(self._names, 0.0)
        ends = [*(stage.first_step for stage in self._stages[1:]), step]
        for stage, end, windows in zip(self._stages, ends, self._windows, strict=True):
            samples = max(0, min(step, end) - stage.first_step) * stage.sequences
            for name, share, cut in zip(self._names, self._shares, windows, strict=True):
                done[name] += samples * share / cut.count
        return done

    def steps_within(self, tokens: int) -> int:
        """Steps of the last stage that read at most `tokens` tokens, and no set more than once; one at least."""
        stage, counts = self._stages[-1], zip(self._blend.counts, self._windows[-1], strict=True)
        once = min(cut.count * self._blend.length // count for count, cut in counts)
        return max(1, min(tokens // stage.context, once) // stage.sequences)


def common_tokenizer(folders: Sequence[Path], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that all of some prepared folders were made with, for a model of `vocab_size` if that is given.

    Raises:
        UserError: they were not made with the same, or the model has too few rows for its pieces.
    """
    first, *others = folders
    tokenizer = load_tokenizer(first)
    for folder in others:
        if load_tokenizer(folder).sha256 != tokenizer.sha256:
            raise UserError(f"{first} and {folder} were prepared with different tokenizers; prepare one of them again")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size} is smaller than the {tokenizer.vocab_size} pieces of the tokenizer of "
            f"{first}; raise model.vocab_size"
        )
    return tokenizer
