"""Synthetic tasks that ask a model for what it has read: recall of pairs, induction, and statistics of the context.

Every task draws sequences of tokens, and scores the prediction at some of them. A model is trained on sequences of one
length and tested on those of other lengths too.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from tostlm.config import PositiveFloat, PositiveInt, Strict
from tostlm.errors import UserError
from tostlm.model import IGNORE


class Examples(NamedTuple):
    """Sequences, what is to be predicted at each token, and the best possible loss there."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, `IGNORE` where nothing is asked
    best_loss: float  # mean over what is asked, in nats


NOT_EMPTY = pydantic.Field(min_length=1)
LearningRates = Annotated[tuple[PositiveFloat, ...], NOT_EMPTY]


class Task(Strict):
    """A task and how models are trained on it."""

    kind: Literal["recall", "induction", "ngrams"]
    tokens: Annotated[int, pydantic.Field(ge=8)]  # of a training sequence
    pairs: PositiveInt = 8  # of a key and a value; of recall
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
        return (induction if self.kind == "induction" else ngrams)(generator, batch, tokens, self.vocab_size)


def recall(generator: torch.Generator, B: int, T: int, vocab_size: int, pairs: int) -> Examples:
    """Pairs of a key and a value, then each key once more at a random place, where its value is asked; token 0 between.

    Source: multi-query associative recall (arXiv 2312.04927), with questions spread evenly over the rest.
    """
    half = vocab_size // 2  # keys are below it, values from there on
    keys = _permutations(generator, B, half - 1)[:, :pairs] + 1
    values = torch.randint(half, vocab_size, (B, pairs), generator=generator)
    tokens, targets = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), IGNORE)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    places = 2 * pairs + _permutations(generator, B, T - 2 * pairs)[:, :pairs]
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return Examples(tokens, targets, 0.0)


def induction(generator: torch.Generator, B: int, T: int, vocab_size: int) -> Examples:
    """Random tokens; the last stands once before, and what followed it there is asked.

    Source: induction heads as in Mamba (arXiv 2312.00752).
    """
    tokens = torch.randint(1, vocab_size, (B, T), generator=generator)
    place = torch.randint(0, T - 2, (B, 1), generator=generator)
    tokens.scatter_(1, place, 0)
    targets = torch.full((B, T), IGNORE)
    targets[:, -1] = tokens.gather(1, place + 1)[:, 0]
    tokens[:, -1] = 0
    return Examples(tokens, targets, 0.0)


def ngrams(generator: torch.Generator, B: int, T: int, states: int) -> Examples:
    """A Markov chain of its own in each sequence, whose transition probabilities are uniformly distributed.

    The best loss is that of the posterior mean, (count of the transition + 1) / (count of the state + states).

    Source: in-context learning of Markov chains (arXiv 2402.11004).
    """
    rows = -torch.rand(B, states, states, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    chain = rows / rows.sum(-1, keepdim=True)  # a uniform draw from the simplex
    tokens = torch.empty(B, T + 1, dtype=torch.long)
    tokens[:, 0] = torch.randint(states, (B,), generator=generator)
    counts = torch.ones(B, states, states, dtype=torch.float64)
    sequences, best = torch.arange(B), torch.zeros((), dtype=torch.float64)
    for t in range(T):
        state = tokens[:, t]
        following = torch.multinomial(chain[sequences, state], 1, generator=generator)[:, 0]
        seen = counts[sequences, state]
        best -= (seen[sequences, following] / seen.sum(-1)).log().mean() / T
        counts[sequences, state, following] += 1
        tokens[:, t + 1] = following
    return Examples(tokens[:, :-1], tokens[:, 1:].contiguous(), float(best))


def _permutations(generator: torch.Generator, rows: int, n: int) -> Tensor:
    """Return a random permutation of 0 to n - 1 in each of the rows."""
    return torch.rand(rows, n, generator=generator).argsort(-1)
