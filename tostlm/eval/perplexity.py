"""How well a model predicts held-out tokens at each context: losses summed by document, and what follows of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch

from tostlm.data import Targets, TokenSet
from tostlm.errors import UserError
from tostlm.eval.bootstrap import Interval, ratio_interval
from tostlm.eval.models import ScoredModel
from tostlm.eval.protocols import Passage, before_targets, context_of, within
from tostlm.eval.text import HeldOutText, require_tokenizer
from tostlm.eval.token_scores import PASS_TOKENS
from tostlm.model import perplexity

DECODED_TOKENS = 65_536  # at a time


class Totals(NamedTuple):
    """Sums over the tokens that are scored at one context, by held-out document: float64 [documents] each."""

    nats: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray
    words: np.ndarray  # that begin there; white space is between them

    @classmethod
    def zeros(cls, documents: int) -> Totals:
        """Return the sums over no tokens."""
        return cls(*(np.zeros(documents) for _ in cls._fields))

    def add(self, document: int, nats: float, tokens: int, text_bytes: int, words: int) -> None:
        """Add some tokens of a document."""
        for sums, value in zip(self, (nats, tokens, text_bytes, words), strict=True):
            sums[document] += value


class Score(NamedTuple):
    """How well a model predicts tokens from up to `context` tokens before them."""

    context: int
    nats: float  # mean over the tokens
    low: float | None  # the bounds of its confidence interval of 95% over documents; None of a single document
    high: float | None
    bits_per_byte: float
    perplexity: float
    word_perplexity: float | None  # None where no word begins
    tokens: int
    documents: int

    @classmethod
    def of(cls, context: int, totals: Totals) -> Score:
        """Return the score that sums over some tokens give."""
        nats, words = float(totals.nats.sum()), float(totals.words.sum())
        mean, low, high = ratio_interval(totals.nats, totals.tokens)
        return cls(
            context,
            mean,
            low,
            high,
            bits_per_byte=nats / math.log(2) / max(1.0, float(totals.text_bytes.sum())),  # 0 where documents end
            perplexity=perplexity(mean),
            word_perplexity=perplexity(nats / words) if words else None,
            tokens=int(totals.tokens.sum()),
            documents=int((totals.tokens > 0).sum()),
        )


def gain(before: Totals, after: Totals) -> Interval:
    """Return by how many nats a token the same tokens are predicted better at one context than at another before it."""
    return ratio_interval(before.nats - after.nats, after.tokens)


def measure(
    model: ScoredModel,
    text: HeldOutText,
    contexts: Sequence[int],
    passages: Iterable[Passage],
    pass_tokens: int = PASS_TOKENS,
    on_progress: Callable[[int], object] = lambda read: None,
) -> list[Totals]:
    """Return the sums over the tokens that passages, all of these contexts, score at each.

    `on_progress` is called with the number of tokens that were read.

    Raises:
        UserError: a loss is not finite.
    """
    ends = text.document_bounds[:, 1]
    found = [Totals.zeros(len(ends)) for _ in contexts]
    for batch in _batches(passages, pass_tokens):
        for passage, row, losses in _losses(model, text, batch, pass_tokens):
            _add(found, ends, passage, row, losses, model)
        on_progress(sum(passage.end - passage.start - 1 for passage in batch))
    return found


def spread(model: ScoredModel, text: HeldOutText, passages: Sequence[Passage], pass_tokens: int) -> float:
    """Return the standard deviation over passages of their mean loss, in nats a token; 0 of a single one."""
    batches = _batches(passages, pass_tokens)
    means = [nats.mean() for batch in batches for _, _, nats in _losses(model, text, batch, pass_tokens)]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def _batches(passages: Iterable[Passage], pass_tokens: int) -> Iterator[list[Passage]]:
    """Yield passages of one shape together, as many as one pass reads."""
    for (length, _), alike in groupby(passages, key=lambda p: (p.end - p.start, p.scored)):
        batch: list[Passage] = []
        for passage in alike:
            batch.append(passage)
            if (len(batch) + 1) * length > pass_tokens:
                yield batch
                batch = []
        if batch:
            yield batch


def _losses(
    model: ScoredModel, text: HeldOutText, batch: Sequence[Passage], pass_tokens: int
) -> Iterator[tuple[Passage, np.ndarray, np.ndarray]]:
    """Yield passages, the tokens that they read and the nats of those that are scored."""
    rows = np.stack([text.read(passage.start, passage.end) for passage in batch])
    losses = model.score(torch.from_numpy(rows).to(model.device), batch[0].scored, pass_tokens)
    found = losses.double().cpu().numpy()
    for passage, row, nats in zip(batch, rows, found, strict=True):
        if not np.isfinite(nats).all():
            place = passage.end - passage.scored + int(np.flatnonzero(~np.isfinite(nats))[0])
            raise UserError(
                f"{model.path}: the loss of token {place} of {text} is not finite, read from token "
                f"{passage.start} on; the model has diverged, or needs a wider dtype"
            )
        yield passage, row, nats


def _add(
    found: Sequence[Totals],
    document_ends: np.ndarray,
    passage: Passage,
    row: np.ndarray,
    nats: np.ndarray,
    model: ScoredModel,
) -> None:
    """Add the scored tokens of a passage to the sums of their documents at the contexts that they count for."""
    places, first = context_of(passage), len(row) - passage.scored
    documents = np.searchsorted(document_ends, np.arange(passage.end - passage.scored, passage.end), side="right")
    edges = [0, *(np.flatnonzero(np.diff(places) | np.diff(documents)) + 1).tolist(), len(places)]
    for start, end in pairwise(edges):
        scored = row[first + start : first + end]
        text_bytes = int(model.tokenizer.token_bytes[scored].sum())
        words = _words_begun(model, row[max(0, first + start - 1) : first + end])
        found[places[start]].add(int(documents[start]), float(nats[start:end].sum()), end - start, text_bytes, words)


def _words_begun(model: ScoredModel, ids: np.ndarray) -> int:
    """Return how many words begin after the first of some tokens; that one alone may be of another document."""
    if len(ids) > DECODED_TOKENS:  # in pieces, as a long document's words would take much memory
        starts = range(0, len(ids) - 1, DECODED_TOKENS - 1)
        return sum(_words_begun(model, ids[start : start + DECODED_TOKENS]) for start in starts)
    decode = model.tokenizer.decode
    if ids[0] == model.tokenizer.eos_id:
        return len(decode(ids[1:].tolist()).split())
    return len(decode(ids.tolist()).split()) - len(decode(ids[:1].tolist()).split())


def score_contexts(model: ScoredModel, text: TokenSet, targets: Targets, contexts: Sequence[int]) -> Iterator[Score]:
    """Yield the model's score on the same targets at each context, shortest first, up to the model's positions.

    Raises:
        UserError: the text was prepared with another tokenizer than the model's, or a loss is not finite.
    """
    require_tokenizer(text, model.tokenizer, model.path)
    for context in within(contexts, model.positions):
        (totals,) = measure(model, text, [context], before_targets(targets, [context]))
        yield Score.of(context, totals)
