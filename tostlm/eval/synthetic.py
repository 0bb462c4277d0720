"""Synthetic sequences that ask a model for what it has read, from a seed, at any length.

Models are trained on them by `tostlm study`; those that make sense as text are read by trained models too (probes.py).

Shapes: B sequences, T tokens, V different tokens, S states of a chain.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.model import IGNORE

BLANK = 0  # the token that stands where nothing is said
# Of ListOps: digits 0 to 9 are tokens 1 to 10.
FIRST_DIGIT, CLOSE, ASK = 1, 15, 16
OPERATIONS: dict[int, Callable[[list[int]], int]] = {
    11: max,
    12: min,
    13: statistics.median_low,
    14: lambda digits: sum(digits) % 10,
}
LISTOPS_TOKENS = 17
MOST_ARGUMENTS, DEEPEST = 5, 6  # of an operation of ListOps, and how far operations stand in each other
NESTED = 0.75  # the share of arguments that are operations, where there is room


class Examples(NamedTuple):
    """Sequences, what is to be predicted at each token, and how well that is possible."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, `IGNORE` where nothing is asked
    best_loss: float  # mean over what is asked, in nats
    best: Tensor | None = None  # [B, T, S] float64: the best prediction, where no token is certain


def recall(generator: torch.Generator, B: int, T: int, vocab_size: int, pairs: int) -> Examples:
    """Pairs of a key and a value, then each key once more at a random place, where its value is asked; blanks between.

    Source: multi-query associative recall (arXiv 2312.04927), with questions spread evenly over the rest.
    """
    half = vocab_size // 2  # keys are below it, values from there on
    keys = permutations(generator, B, half - 1)[:, :pairs] + 1
    values = torch.randint(half, vocab_size, (B, pairs), generator=generator)
    tokens, targets = torch.full((B, T), BLANK), torch.full((B, T), IGNORE)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    places = 2 * pairs + permutations(generator, B, T - 2 * pairs)[:, :pairs]
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


def selective_copy(generator: torch.Generator, B: int, T: int, vocab_size: int, items: int) -> Examples:
    """Items at random places among blanks, then as many times token 1, at which they are asked in order.

    Source: selective copying as in Mamba (arXiv 2312.00752).
    """
    read = T - items
    places = permutations(generator, B, read)[:, :items].sort(-1).values
    values = torch.randint(2, vocab_size, (B, items), generator=generator)
    tokens, targets = torch.full((B, T), BLANK), torch.full((B, T), IGNORE)
    tokens.scatter_(1, places, values)
    tokens[:, read:], targets[:, read:] = 1, values
    return Examples(tokens, targets, 0.0)


def listops(generator: torch.Generator, B: int, T: int) -> Examples:
    """Nested operations on digits (maximum, minimum, median, sum modulo 10) after blanks, whose result is asked last.

    The median of an even number of digits is the lower of the two in the middle.

    Source: ListOps (arXiv 1804.06028).
    """
    draw = random.Random(int(torch.randint(1 << 62, (1,), generator=generator)))
    tokens, targets = torch.full((B, T), BLANK), torch.full((B, T), IGNORE)
    for row in range(B):
        written, result = _expression(draw, T - 1, DEEPEST)
        tokens[row, T - 1 - len(written) : -1] = torch.tensor(written)
        targets[row, -1] = FIRST_DIGIT + result
    tokens[:, -1] = ASK
    return Examples(tokens, targets, 0.0)


def _expression(draw: random.Random, room: int, depth: int) -> tuple[list[int], int]:
    """Return the tokens of an operation, at most `room` of them and at least 4, and its result."""
    operation, room = draw.choice(list(OPERATIONS)), room - 2
    written, digits = [operation], list[int]()
    for left in range(draw.randint(2, min(MOST_ARGUMENTS, room)), 0, -1):
        # About an equal share of what is left, so that one argument does not take it all.
        share = min(draw.randint(1, max(1, 2 * room // left)), room - (left - 1))
        nested = depth > 1 and share >= 4 and draw.random() < NESTED
        part, digit = _expression(draw, share, depth - 1) if nested else _digit(draw)
        written, digits, room = written + part, [*digits, digit], room - len(part)
    return [*written, CLOSE], OPERATIONS[operation](digits)


def _digit(draw: random.Random) -> tuple[list[int], int]:
    digit = draw.randrange(10)
    return [FIRST_DIGIT + digit], digit


def ngrams(generator: torch.Generator, B: int, T: int, states: int) -> Examples:
    """A Markov chain of its own in each sequence, whose transition probabilities are uniformly distributed.

    The best prediction is the posterior mean, (count of the transition + 1) / (count of the state + states).

    Source: in-context learning of Markov chains (arXiv 2402.11004).
    """
    rows = -torch.rand(B, states, states, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    chain = rows / rows.sum(-1, keepdim=True)  # a uniform draw from the simplex
    tokens = torch.empty(B, T + 1, dtype=torch.long)
    tokens[:, 0] = torch.randint(states, (B,), generator=generator)
    counts = torch.ones(B, states, states, dtype=torch.float64)
    sequences, best = torch.arange(B), torch.empty(B, T, states, dtype=torch.float64)
    for t in range(T):
        state = tokens[:, t]
        tokens[:, t + 1] = torch.multinomial(chain[sequences, state], 1, generator=generator)[:, 0]
        best[:, t] = counts[sequences, state] / counts[sequences, state].sum(-1, keepdim=True)
        counts[sequences, state, tokens[:, t + 1]] += 1
    targets = tokens[:, 1:].contiguous()
    best_loss = -float(best.gather(-1, targets[..., None]).log().mean())
    return Examples(tokens[:, :-1], targets, best_loss, best)


def permutations(generator: torch.Generator, rows: int, n: int) -> Tensor:
    """Return a random permutation of 0 to n - 1 in each of the rows: [rows, n]."""
    return torch.rand(rows, n, generator=generator).argsort(-1)
