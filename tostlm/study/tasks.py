"""The synthetic tasks of a study: models are trained on sequences of one length and tested on those of others too."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
import torch

from tostlm.config import PositiveFloat, PositiveInt, Strict
from tostlm.errors import UserError
from tostlm.eval.synthetic import LISTOPS_TOKENS, Examples, induction, listops, ngrams, recall, selective_copy

NOT_EMPTY = pydantic.Field(min_length=1)
LearningRates = Annotated[tuple[PositiveFloat, ...], NOT_EMPTY]


class Task(Strict):
    """A task and how models are trained on it."""

    kind: Literal["recall", "induction", "ngrams", "selective-copy", "listops"]
    tokens: Annotated[int, pydantic.Field(ge=8)]  # of a training sequence
    pairs: PositiveInt = 8  # of a key and a value; of recall
    items: PositiveInt = 16  # to copy; of selective-copy
    vocab_size: Annotated[int, pydantic.Field(ge=2)] = 512  # different tokens; of n-grams, the states of a chain
    steps: PositiveInt = 2000  # at most: training ends once 99.9% are right
    batch_tokens: PositiveInt = 8192
    lrs: LearningRates = (1e-3, 3e-3, 1e-2)  # of which the best counts
    lengths: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (1, 4)  # tested, in multiples of `tokens`

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Task:
        if self.kind == "recall" and 4 * self.pairs > self.tokens:
            raise ValueError(f"{self.pairs} pairs, and as many questions, need {4 * self.pairs} tokens or more")
        if self.kind == "recall" and self.pairs >= self.vocab_size // 2:
            raise ValueError(f"pairs {self.pairs} need a vocab_size of {2 * self.pairs + 2} or more, half of it keys")
        if self.kind == "selective-copy" and 2 * self.items > self.tokens:
            raise ValueError(f"{self.items} items, and as many questions, need {2 * self.items} tokens or more")
        least = {"selective-copy": 3, "listops": LISTOPS_TOKENS}.get(self.kind, 2)
        if self.vocab_size < least:
            raise ValueError(f"{self.kind} needs a vocab_size of {least} or more")
        return self

    def require_positions(self, positions: int | None, arm: str) -> None:
        """Check that a model of so many positions can be trained on the task and tested at its first length.

        Raises:
            UserError: it has too few.
        """
        needed = self.tokens * self.lengths[0]
        if positions is not None and positions < needed:
            raise UserError(
                f"arm {arm} has {positions} positions, and a task {needed} tokens; raise its model.positions, or set "
                "them for all by task_set"
            )

    def draw(self, generator: torch.Generator, batch: int, tokens: int) -> Examples:
        """Return new sequences of `tokens` T."""
        if self.kind == "recall":
            return recall(generator, batch, tokens, self.vocab_size, self.pairs)
        if self.kind == "selective-copy":
            return selective_copy(generator, batch, tokens, self.vocab_size, self.items)
        if self.kind == "listops":
            return listops(generator, batch, tokens)
        return (induction if self.kind == "induction" else ngrams)(generator, batch, tokens, self.vocab_size)
