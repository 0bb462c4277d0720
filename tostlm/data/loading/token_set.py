"""One split of a prepared folder, read as one long array of tokens or in windows of one length."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from tostlm.data.shards import Shard, read_manifest
from tostlm.errors import UserError

OPEN_SHARDS = 64  # of a token set at a time: each needs a file descriptor, and a process has a limited number of them


class TokenSet:
    """The split `TRAIN` or `VALIDATION` of a prepared folder as one long array of tokens.

    Its shards are memory-mapped when they are read.

    Raises:
        UserError: the folder is not prepared, a shard is missing or has another size than its manifest says, or the
            split holds no tokens.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self._name = folder, split
        self.manifest = read_manifest(folder)
        if split not in self.manifest.splits:
            raise UserError(f"{folder} has no split {split!r}, only {', '.join(self.manifest.splits)}")
        self.split = self.manifest.splits[split]
        if not self.split.tokens:
            raise UserError(
                f"the {split} split of {folder} holds no tokens; prepare more documents, or use another "
                f"--heldout-fraction than {self.manifest.heldout_fraction}"
            )
        for shard in self.split.shards:
            self._check_tokens(shard)
            self._check_size(shard.name + ".ends", shard.documents * 8)
        self._shard_starts = np.cumsum([0, *(shard.tokens for shard in self.split.shards)])
        self._open_shard = lru_cache(OPEN_SHARDS)(self._map_shard)

    def _check_tokens(self, shard: Shard) -> Path:
        return self._check_size(shard.name + ".bin", shard.tokens * np.dtype(self.manifest.dtype).itemsize)

    def _check_size(self, name: str, expected: int) -> Path:
        path = self.folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"shard {path} has {found} bytes, its manifest says {expected}; prepare the data again")
        return path

    def _map_shard(self, shard: int) -> np.ndarray:
        path = self._check_tokens(self.split.shards[shard])  # again: it may be read long after the start
        return np.memmap(path, self.manifest.dtype, mode="r")

    def __len__(self) -> int:
        return self.split.tokens

    def __str__(self) -> str:
        return f"the {self._name} split of {self.folder}"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of the split from `start` up to `stop`, as int64 [stop - start].

        Raises:
            UserError: a token is outside the vocabulary, or a shard has another size by now.
        """
        parts = [np.empty(0, np.int64)]
        shard = bisect_right(self._shard_starts, start) - 1
        while start < stop:
            base = int(self._shard_starts[shard])
            part = self._open_shard(shard)[start - base : stop - base].astype(np.int64)
            if part.size and part.max() >= self.manifest.vocab_size:
                name = self.folder / f"{self.split.shards[shard].name}.bin"
                raise UserError(
                    f"shard {name} holds token {part.max()}, beyond its vocabulary of {self.manifest.vocab_size}: "
                    f"it is damaged; see `tostlm data verify {self.folder}`"
                )
            parts.append(part)
            shard += 1
            start = int(self._shard_starts[shard])
        return np.concatenate(parts)

    def document_bounds_by_shard(self) -> Iterator[np.ndarray]:
        """Yield, shard by shard, the first and past-the-last token of each document: int64 [documents, 2].

        Tokens are numbered within the split, and a document includes its end-of-document token.

        Raises:
            UserError: a shard's .ends is damaged.
        """
        for shard, base in zip(self.split.shards, self._shard_starts, strict=False):
            path = self.folder / f"{shard.name}.ends"
            edges = np.concatenate([[0], np.fromfile(path, "<u8").astype(np.int64)])
            if edges[-1] != shard.tokens or (np.diff(edges) < 1).any():
                raise UserError(
                    f"shard {path} is damaged: its document ends do not ascend to {shard.tokens}; "
                    f"see `tostlm data verify {self.folder}`"
                )
            yield np.stack([edges[:-1], edges[1:]], axis=1) + base

    @cached_property
    def document_bounds(self) -> np.ndarray:
        """The bounds of all documents of the split, as `document_bounds_by_shard` yields them."""
        return np.concatenate(list(self.document_bounds_by_shard()))


class Windows:
    """Windows of a token set, cut one after another from all its tokens or, `within_documents`, from each document.

    `windows[n]` is window number n, int64 [context + 1]: the inputs of a training sequence and one more token, the last
    target. Windows of a document begin with the end-of-document token before it; its rest after its last whole window,
    and documents shorter than a window, are not read. Their index takes 16 bytes for each document that is long enough.

    Raises:
        UserError: there are too few tokens for one window, or no document is long enough.
    """

    def __init__(self, tokens: TokenSet, context: int, within_documents: bool) -> None:
        self._tokens, self._context = tokens, context
        bounds_by_shard = tokens.document_bounds_by_shard() if within_documents else [np.array([[0, len(tokens)]])]
        starts_and_counts: list[np.ndarray] = []  # int64 [2, documents that are long enough] of each shard
        longest = 0
        for bounds in bounds_by_shard:
            first = np.maximum(bounds[:, 0] - 1, 0)  # the first document of all has no end-of-document token before it
            windows = (bounds[:, 1] - first - 1) // context
            starts_and_counts.append(np.stack([first, windows])[:, windows > 0])
            longest = max(longest, int(np.diff(bounds).max(initial=0)))
        self._starts, counts = np.concatenate(starts_and_counts, axis=1)
        self._cumulative = np.cumsum(counts, out=counts)  # windows up to the end of each document
        if not len(self._starts):
            too_few = (
                f"no document of {tokens} fills a window of {context} tokens (the longest has {longest}, its end "
                "included); prepare longer documents"
                if within_documents
                else f"{tokens} holds {len(tokens)} tokens, fewer than one window of {context}; prepare more text"
            )
            raise UserError(f"{too_few} or lower data.context_tokens")

    def __len__(self) -> int:
        return int(self._cumulative[-1])

    def __getitem__(self, number: int) -> np.ndarray:
        document = int(np.searchsorted(self._cumulative, number, side="right"))
        earlier = int(self._cumulative[document - 1]) if document else 0
        start = int(self._starts[document]) + (number - earlier) * self._context
        return self._tokens.read(start, start + self._context + 1)
