"""Windows: rows of tokens of one length, each the inputs of a training sequence and one more token, the last target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from tostlm.errors import UserError


class TokenSource(Protocol):
    """A long array of tokens that windows are cut from; `TokenSet` is one."""

    folder: Path

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...

    def document_bounds_by_shard(self) -> Iterator[np.ndarray]: ...


class StreamWindows:
    """Windows cut one after another from all tokens, across the ends of documents.

    `windows[n]` is window number n, int64 [context + 1].

    Args:
        tokens: the tokens.
        context: inputs of a window, in tokens.

    Raises:
        UserError: there are fewer tokens than one window needs.
    """

    def __init__(self, tokens: TokenSource, context: int) -> None:
        self._tokens, self._context = tokens, context
        if not len(self):
            raise UserError(
                f"{tokens} holds {len(tokens)} tokens, fewer than one window of {context}; "
                "prepare more text or lower data.context_tokens"
            )

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._context

    def __getitem__(self, number: int) -> np.ndarray:
        return self._tokens.read(number * self._context, (number + 1) * self._context + 1)


class DocumentWindows:
    """Windows that each lie within one document and the end-of-document token before it.

    `windows[n]` is window number n, int64 [context + 1]. The rest of a document after its last whole window, and
    documents shorter than a window, are not read. The index takes 16 bytes for each document that is long enough.

    Args:
        tokens: the tokens.
        context: inputs of a window, in tokens.

    Raises:
        UserError: no document is long enough.
    """

    def __init__(self, tokens: TokenSource, context: int) -> None:
        self._tokens, self._context = tokens, context
        starts, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        longest = 0
        for bounds in tokens.document_bounds_by_shard():
            first = np.maximum(bounds[:, 0] - 1, 0)  # the first document of all has no end-of-document token before it
            windows = (bounds[:, 1] - first - 1) // context
            starts.append(first[windows > 0])
            counts.append(windows[windows > 0])
            longest = max(longest, int((bounds[:, 1] - bounds[:, 0]).max(initial=0)))
        self._starts = np.concatenate(starts)
        self._cumulative = np.cumsum(np.concatenate(counts))  # windows in all documents up to and including this one
        if not len(self._starts):
            raise UserError(
                f"no document of {tokens} fills a window of {context} tokens (the longest has {longest}, its end "
                "included); prepare longer documents or lower data.context_tokens"
            )

    def __len__(self) -> int:
        return int(self._cumulative[-1])

    def __getitem__(self, number: int) -> np.ndarray:
        document = int(np.searchsorted(self._cumulative, number, side="right"))
        earlier = int(self._cumulative[document - 1]) if document else 0
        start = int(self._starts[document]) + (number - earlier) * self._context
        return self._tokens.read(start, start + self._context + 1)
