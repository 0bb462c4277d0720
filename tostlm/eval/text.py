"""Held-out documents in the tokens of a model, whichever tokenizer they were prepared with."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from tostlm.data import Targets, Tokenizer, TokenSet
from tostlm.errors import UserError


class HeldOutText(Protocol):
    """Documents one after the other, each with the end-of-document token after it."""

    folder: Path

    @property
    def document_bounds(self) -> np.ndarray: ...  # int64 [documents, 2], of the first and past the last token
    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> np.ndarray: ...


class Retokenized:
    """A held-out split in the tokens of another tokenizer, which takes 8 bytes a token of memory."""

    def __init__(self, prepared: TokenSet, tokenizer: Tokenizer) -> None:
        self.folder, self._prepared, self._tokenizer = prepared.folder, prepared, tokenizer
        self._own = Tokenizer.from_folder(prepared.folder)

    @cached_property
    def _ids_and_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        bounds = self._prepared.document_bounds.tolist()
        texts = (self._own.decode(self._prepared.read(first, stop).tolist()) for first, stop in bounds)
        documents = [np.array([*self._tokenizer.encode(text), self._tokenizer.eos_id]) for text in texts]
        ends = np.cumsum([len(document) for document in documents])
        return np.concatenate(documents), np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)

    @property
    def _ids(self) -> np.ndarray:
        return self._ids_and_bounds[0]

    @property
    def document_bounds(self) -> np.ndarray:
        return self._ids_and_bounds[1]

    def __len__(self) -> int:
        return len(self._ids)

    def __str__(self) -> str:
        return f"{self._prepared}, in the tokens of another tokenizer,"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`."""
        return self._ids[start:stop]

    def spans(self, targets: Targets) -> list[tuple[int, int]]:
        """Return the tokens, from the first up to past the last, whose text begins within that of each target."""
        found: list[tuple[int, int]] = []
        bounds = self._prepared.document_bounds
        documents = np.searchsorted(bounds[:, 1], np.array(targets.ends) - targets.span, side="right").tolist()
        for document, ends in groupby(zip(documents, targets.ends, strict=True), key=lambda pair: pair[0]):
            (first, stop), (offset, end_of_own) = bounds[document].tolist(), self.document_bounds[document].tolist()
            theirs = _text_starts(self._own, self._prepared.read(first, stop))
            own = _text_starts(self._tokenizer, self.read(offset, end_of_own))
            for _, end in ends:
                edges = [theirs[end - targets.span - first], theirs[end - first]]
                begin, finish = (offset + np.searchsorted(own[:-1], edges)).tolist()
                if begin < finish:
                    found.append((begin, finish))
        return found


def _text_starts(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Return where in its document's text each token begins, in bytes, and where the last one ends: [tokens + 1]."""
    sizes = tokenizer.token_bytes[ids]
    added = int(sizes.sum()) - len(tokenizer.decode(ids.tolist()).encode())  # a space before the text, or none
    starts: np.ndarray = np.maximum(np.concatenate([[0], np.cumsum(sizes)]) - max(0, min(1, added)), 0)
    return starts


def require_tokenizer(prepared: TokenSet, tokenizer: Tokenizer, path: Path) -> None:
    """Check that a model, of the checkpoint or folder `path`, can read a text as it was prepared.

    Raises:
        UserError: it was prepared with another tokenizer.
    """
    if prepared.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{prepared.folder} was prepared with another tokenizer than the one {path} was trained with")


def text_of(prepared: TokenSet, tokenizer: Tokenizer) -> TokenSet | Retokenized:
    """Return the documents of a held-out split in a tokenizer's tokens."""
    same = prepared.manifest.tokenizer_sha256 == tokenizer.sha256
    return prepared if same else Retokenized(prepared, tokenizer)
