"""Reading a split of a prepared folder as one long array of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from tostlm.data.shards import read_manifest
from tostlm.errors import UserError

OPEN_SHARDS = 64  # of a set at once: each takes a file descriptor, of which a process has few


class TokenSet:
    """One split of a prepared folder, as one long array of tokens, mapped into memory shard by shard.

    Raises:
        UserError: the folder is unfinished or of another format, a shard is missing or cut short, the split is empty.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self._name = folder, split
        self.manifest = read_manifest(folder)
        if split not in self.manifest.splits:
            raise UserError(f"{folder} has no split {split!r}, only {', '.join(self.manifest.splits)}")
        self.split = self.manifest.splits[split]
        if not self.split.tokens:
            raise UserError(
                f"the {split} split of {folder} holds no tokens; prepare more documents, or another --heldout-fraction "
                f"than {self.manifest.heldout_fraction}"
            )
        for shard in self.split.shards:
            self._check_size(shard.name + ".bin", shard.tokens * np.dtype(self.manifest.dtype).itemsize)
            self._check_size(shard.name + ".ends", shard.documents * 8)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.split.shards)])
        self._mapped = lru_cache(OPEN_SHARDS)(self._map)

    def _check_size(self, name: str, expected: int) -> None:
        path = self.folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"shard {path} has {found} bytes, its manifest says {expected}; prepare the data again")

    def _map(self, shard: int) -> np.ndarray:
        return np.memmap(self.folder / f"{self.split.shards[shard].name}.bin", self.manifest.dtype, mode="r")

    def __len__(self) -> int:
        return self.split.tokens

    def __str__(self) -> str:
        return f"the {self._name} split of {self.folder}"

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of the split, across shards, as int64.

        Raises:
            UserError: an id is outside the vocabulary, so the shard is damaged.
        """
        parts = []
        shard = bisect_right(self._starts, start) - 1
        while start < stop:
            base = int(self._starts[shard])
            part = self._mapped(shard)[start - base : stop - base].astype(np.int64)
            if part.size and part.max() >= self.manifest.vocab_size:
                name = self.folder / f"{self.split.shards[shard].name}.bin"
                raise UserError(
                    f"shard {name} holds token {part.max()}, beyond its vocabulary of {self.manifest.vocab_size}: "
                    f"it is damaged; see `tostlm data verify {self.folder}`"
                )
            parts.append(part)
            shard += 1
            start = int(self._starts[shard])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def shard_bounds(self) -> Iterator[np.ndarray]:
        """Of one shard after another, `document_bounds` of its documents."""
        for shard, base in zip(self.split.shards, self._starts, strict=False):
            ends = np.fromfile(self.folder / f"{shard.name}.ends", "<u8")
            edges = np.concatenate([[0], ends.astype(np.int64)]) + base
            yield np.stack([edges[:-1], edges[1:]], axis=1)

    @cached_property
    def document_bounds(self) -> np.ndarray:
        """First and past-the-last token of every document, its document end included: [documents, 2]."""
        return np.concatenate(list(self.shard_bounds()))
