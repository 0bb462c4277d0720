"""One split of a prepared folder, read as one long array of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from tostlm.data.shards import read_manifest
from tostlm.errors import UserError

OPEN_SHARDS = 64  # of a token set at a time: each needs a file descriptor, and a process has a limited number of them


class TokenSet:
    """One split of a prepared folder as one long array of tokens; its shards are memory-mapped when they are read.

    Args:
        folder: the prepared folder.
        split: `TRAIN` or `VALIDATION`.

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
            self._check_size(shard.name + ".bin", shard.tokens * np.dtype(self.manifest.dtype).itemsize)
            self._check_size(shard.name + ".ends", shard.documents * 8)
        self._shard_starts = np.cumsum([0, *(shard.tokens for shard in self.split.shards)])
        self._open_shard = lru_cache(OPEN_SHARDS)(self._map_shard)

    def _check_size(self, name: str, expected: int) -> None:
        path = self.folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"shard {path} has {found} bytes, its manifest says {expected}; prepare the data again")

    def _map_shard(self, shard: int) -> np.ndarray:
        return np.memmap(self.folder / f"{self.split.shards[shard].name}.bin", self.manifest.dtype, mode="r")

    def __len__(self) -> int:
        return self.split.tokens

    def __str__(self) -> str:
        return f"the {self._name} split of {self.folder}"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of the split from `start` up to `stop`, as int64 [stop - start].

        Raises:
            UserError: a token is outside the vocabulary, so a shard is damaged.
        """
        parts = []
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
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

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
