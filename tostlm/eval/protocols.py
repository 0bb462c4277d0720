"""Which held-out tokens are scored, from how much before them: the three protocols.

`same-targets` scores the same tokens at every context, so that nothing but the context changes. `windows` cuts the text
into windows of each length and scores all of them, as papers do: a window's first tokens have little before them.
`stream` reads documents from their start and scores each token by how many are before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tostlm.data import Targets, TokenSet, choose_targets, evenly_spread
from tostlm.errors import UserError
from tostlm.eval.text import HeldOutText, Retokenized


class Passage(NamedTuple):
    """A stretch of held-out tokens, read from its first one on; the last `scored` are scored."""

    start: int  # in the token set
    end: int
    scored: int
    contexts: tuple[int, ...]  # of which each has the tokens up to that many before it; one has all


Protocol = Callable[[TokenSet, HeldOutText, Sequence[int], int | None, int | None], Iterator[Passage]]


def same_targets(
    prepared: TokenSet, text: HeldOutText, contexts: Sequence[int], count: int | None, limit: int | None = None
) -> Iterator[Passage]:
    """Yield passages of `count` windows, or of all, whose last tokens are the same at every context.

    They are chosen in the tokens that the text was prepared in; in others their text is the same.

    A span of targets is half the shortest context long, and its first token has as much less than a context before it,
    in any tokens.

    Raises:
        UserError: no held-out document is longer than the longest context.
    """
    targets = choose_targets(prepared, contexts, len(prepared) if count is None else count)
    if not isinstance(text, Retokenized):
        yield from before_targets(targets, within(contexts, limit))
        return
    bounds = text.document_bounds
    spans = [(first, end) for first, end in text.spans(targets) if limit is None or end - first <= limit]
    for context in within(contexts, limit):
        for first, end in spans:
            document = int(np.searchsorted(bounds[:, 1], first, side="right"))
            start = max(first - 1 - (context - targets.span), int(bounds[document, 0]) - 1, 0)
            start = start if limit is None else max(start, end - 1 - limit)
            yield Passage(start, end, end - first, (context,))


def within(contexts: Sequence[int], limit: int | None) -> list[int]:
    """Return the contexts that a model of `limit` positions can read, ascending; None is no limit."""
    return sorted(context for context in contexts if limit is None or context <= limit)


def before_targets(targets: Targets, contexts: Sequence[int]) -> Iterator[Passage]:
    """Yield the passages that score the same targets at each context, shortest first."""
    for context in sorted(contexts):
        for end in targets.ends:
            yield Passage(end - context - 1, end, targets.span, (context,))


def windows(
    prepared: TokenSet, text: HeldOutText, contexts: Sequence[int], count: int | None, limit: int | None = None
) -> Iterator[Passage]:
    """Yield disjoint windows of each length over the whole text, whatever documents they are of; the last is shorter.

    Raises:
        UserError: the text is shorter than a context.
    """
    for context in within(contexts, limit):
        if context >= len(text):
            raise UserError(f"{text} has {len(text)} tokens, no window of {context}; ask for shorter contexts")
        starts = range(0, len(text) - 1, context)
        for start in starts if count is None else evenly_spread(starts, count):
            end = min(start + context + 1, len(text))
            yield Passage(start, end, end - start - 1, (context,))


def stream(
    prepared: TokenSet, text: HeldOutText, contexts: Sequence[int], count: int | None, limit: int | None = None
) -> Iterator[Passage]:
    """Yield whole documents, up to the longest context; a token is scored at the first context that it has not passed.

    The end of the document before is read first, as in training.
    """
    readable = within(contexts, limit)
    longest = max(readable, default=0)
    bounds = text.document_bounds
    chosen = range(len(bounds)) if count is None else evenly_spread(range(len(bounds)), count)
    for first, stop in bounds[list(chosen)].tolist():
        start = max(first - 1, 0)
        end = min(stop, start + longest + 1)
        if end - start > 1:
            yield Passage(start, end, end - start - 1, tuple(readable))


# They take the held-out text as it was prepared and in a model's tokens, the contexts, how many windows or documents,
# and how many positions the model has.
PROTOCOLS: dict[str, Protocol] = {"same-targets": same_targets, "windows": windows, "stream": stream}


def context_of(passage: Passage) -> np.ndarray:
    """Return, of each scored token of a passage, the place among its contexts of the one that it counts for."""
    before = np.arange(passage.end - passage.start - passage.scored, passage.end - passage.start)  # tokens
    places: np.ndarray = np.searchsorted(passage.contexts, before)
    return places if len(passage.contexts) > 1 else np.zeros_like(places)
