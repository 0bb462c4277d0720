"""How a set of tokens is cut into windows of `context` inputs and the target after the last one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from tostlm.errors import UserError


class Tokens(Protocol):
    """What windows are cut from: a `TokenSet`, or anything else that knows its tokens by number."""

    folder: Path

    def __len__(self) -> int: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...

    def shard_bounds(self) -> Iterator[np.ndarray]: ...


class StreamWindows:
    """Windows cut one after another from the whole set, across the ends of documents.

    Raises:
        UserError: the set is shorter than one window.
    """

    def __init__(self, tokens: Tokens, context: int) -> None:
        self._tokens, self._context = tokens, context
        self.count = (len(tokens) - 1) // context  # each needs one token more, the last target
        if self.count < 1:
            raise UserError(
                f"{tokens} holds {len(tokens)} tokens, fewer than one window of {context}; "
                "prepare more text or lower data.context_tokens"
            )

    def row(self, number: int) -> np.ndarray:
        """The tokens of a window, int64 [context + 1]."""
        return self._tokens.tokens(number * self._context, (number + 1) * self._context + 1)


class DocumentWindows:
    """Windows cut from single documents, each with the document end before it; the rest of a document is left out.

    Documents shorter than a window leave no trace: the index holds 16 bytes a document that is long enough.

    Raises:
        UserError: no document is.
    """

    def __init__(self, tokens: Tokens, context: int) -> None:
        self._tokens, self._context = tokens, context
        starts, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        longest = 0
        for bounds in tokens.shard_bounds():
            first = np.maximum(bounds[:, 0] - 1, 0)  # the set's first document has no end before it
            windows = (bounds[:, 1] - first - 1) // context
            starts.append(first[windows > 0])
            counts.append(windows[windows > 0])
            longest = max(longest, int((bounds[:, 1] - bounds[:, 0]).max(initial=0)))
        self._starts = np.concatenate(starts)
        self._through = np.cumsum(np.concatenate(counts))  # windows up to and including a document's
        if not len(self._starts):
            raise UserError(
                f"no document of {tokens} fills a window of {context} tokens (the longest has {longest}, its end "
                "included); prepare longer documents or lower data.context_tokens"
            )
        self.count = int(self._through[-1])

    def row(self, number: int) -> np.ndarray:
        """The tokens of a window, int64 [context + 1]."""
        document = int(np.searchsorted(self._through, number, side="right"))
        earlier = int(self._through[document - 1]) if document else 0
        start = int(self._starts[document]) + (number - earlier) * self._context
        return self._tokens.tokens(start, start + self._context + 1)
