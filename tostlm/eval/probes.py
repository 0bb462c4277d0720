"""Sequences that show what a trained model brings back from its context: pairs, repeats, a needle in text, a chain.

What is asked consists of random tokens of the model's vocabulary, so that nothing but the context says them, and stands
in the sequence twice: the loss where it is stated is what it costs without having been read.

Shapes: B sequences of T tokens after the end-of-document token, S states of a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tostlm.data import Tokenizer
from tostlm.eval.synthetic import ngrams, permutations
from tostlm.eval.text import HeldOutText

NEEDLE = 3  # tokens of what a needle is found by, and of what it says
STATES = 8  # of a chain


class Probe(NamedTuple):
    """Sequences that are read, and what is asked of them: masks over the tokens after the first, [B, T]."""

    rows: Tensor  # [B, T + 1] int64, from the end-of-document token on
    asked: Tensor
    stated: Tensor | None  # where what is asked stands for the first time
    best: Tensor | None = None  # [B, T, S] float64: the best prediction of the states, where no token is certain
    symbols: Tensor | None = None  # [S]: the tokens that the states are


class Material:
    """What sequences are made of: tokens that stand for text, and stretches of held-out text, both from a seed."""

    def __init__(self, tokenizer: Tokenizer, text: HeldOutText, seed: int) -> None:
        self._text, self._eos = text, tokenizer.eos_id
        self._ids = torch.from_numpy(np.flatnonzero(tokenizer.token_bytes)).to(torch.int64)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def symbols(self) -> int:
        """How many tokens there are to choose from."""
        return len(self._ids)

    def distinct(self, B: int, n: int) -> Tensor:
        """Return n random tokens, no two alike, for each sequence: [B, n]."""
        return self._ids[permutations(self.generator, B, len(self._ids))[:, :n]]

    def any(self, B: int, n: int) -> Tensor:
        """Return n random tokens for each sequence: [B, n]."""
        return self._ids[torch.randint(len(self._ids), (B, n), generator=self.generator)]

    def filler(self, B: int, n: int) -> Tensor:
        """Return a stretch of held-out text for each sequence, from anywhere: [B, n]."""
        starts = torch.randint(len(self._text) - n + 1, (B,), generator=self.generator).tolist()
        return torch.from_numpy(np.stack([self._text.read(start, start + n) for start in starts])).to(torch.int64)

    def sequence(self, *parts: Tensor) -> Tensor:
        """Return parts [B, n] one after the other, after the end-of-document token: [B, T + 1]."""
        return torch.cat([torch.full((len(parts[0]), 1), self._eos), *parts], 1)


def recall(material: Material, B: int, T: int, pairs: int) -> Probe:
    """Pairs of a key and a value, held-out text, then the pairs in another order; asked are the values."""
    keys, values = material.distinct(B, pairs), material.any(B, pairs)
    order = permutations(material.generator, B, pairs)
    again = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    first = torch.stack([keys, values], -1).flatten(1)
    rows = material.sequence(first, material.filler(B, T - 4 * pairs), again)
    return Probe(rows, _marked(B, T, range(T - 2 * pairs + 1, T, 2)), _marked(B, T, range(1, 2 * pairs, 2)))


def induction(material: Material, B: int, T: int) -> Probe:
    """Random tokens, then the same once more; asked are those after the repeat's first.

    Source: the test for induction heads (Olsson et al. 2022, arXiv 2209.11895).
    """
    half = T // 2
    part = material.any(B, half)
    rows = material.sequence(material.any(B, T - 2 * half), part, part)
    begin = T - half
    return Probe(rows, _marked(B, T, range(begin + 1, T)), _marked(B, T, range(begin - half + 1, begin)))


def needle(material: Material, B: int, T: int) -> Probe:
    """Held-out text with random tokens somewhere in it; at its end their first half stands again, the second is asked.

    Over the sequences they stand evenly spread from the start of the text to its end.
    """
    found, said = material.any(B, NEEDLE), material.any(B, NEEDLE)
    filler = material.filler(B, T - 4 * NEEDLE)
    places = torch.linspace(0, filler.shape[1], B).round().long().tolist()
    rows, stated = [], torch.zeros(B, T, dtype=torch.bool)
    for n, place in enumerate(places):
        rows.append(torch.cat([filler[n, :place], found[n], said[n], filler[n, place:], found[n], said[n]]))
        stated[n, place + NEEDLE : place + 2 * NEEDLE] = True
    return Probe(material.sequence(torch.stack(rows)), _marked(B, T, range(T - NEEDLE, T)), stated)


def chain(material: Material, B: int, T: int) -> Probe:
    """A Markov chain of `STATES` states, of its own in each sequence; asked is every token after the first state."""
    symbols = material.distinct(1, STATES)[0]
    drawn = ngrams(material.generator, B, T - 1, STATES)
    assert drawn.best is not None
    states = torch.cat([drawn.tokens, drawn.targets[:, -1:]], 1)
    best = torch.cat([torch.full((B, 1, STATES), 1 / STATES, dtype=torch.float64), drawn.best], 1)
    return Probe(material.sequence(symbols[states]), _marked(B, T, range(1, T)), None, best, symbols)


def _marked(B: int, T: int, places: range) -> Tensor:
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, list(places)] = True
    return mask


PROBES: dict[str, Callable[[Material, int, int], Probe]] = {"induction": induction, "needle": needle, "chain": chain}
