"""Finding documents whose text was there before, by the hashes that shards keep.

All hashes are first divided by their leading bits into files small enough for memory, then each file is sorted: however
many documents there are, their hashes are read twice and written once. Memory holds one such file and one bit a
document.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tostlm.data.shards import HASH_BYTES, Shard
from tostlm.errors import UserError

HASHES_AT_ONCE = 4_000_000  # in memory, some 80 bytes each
ROW = 3  # uint64 in the files: a hash's two halves and the number of its document

ShardRef: TypeAlias = tuple[Path, Shard]  # a shard and the folder that holds its files


class Duplicates:
    """Which of a number of documents are to be left out."""

    def __init__(self, documents: int) -> None:
        self._bits = np.zeros(-(-documents // 8), np.uint8)
        self.count = 0

    def add(self, numbers: np.ndarray) -> None:
        """Leave out documents that were not left out before."""
        np.bitwise_or.at(self._bits, numbers >> 3, np.left_shift(1, numbers & 7).astype(np.uint8))
        self.count += len(numbers)

    def kept(self, first: int, documents: int) -> np.ndarray:
        """Return which of the `documents` from number `first` on are not left out, bool [documents]."""
        bits = self._bits[first // 8 : -(-(first + documents) // 8)]
        return ~np.unpackbits(bits, bitorder="little")[first % 8 :][:documents].astype(bool)


def find_duplicates(earlier: Sequence[ShardRef], shards: Sequence[ShardRef], within: bool, scratch: Path) -> Duplicates:
    """Find the documents of `shards` whose text a document of `earlier` has.

    Args:
        earlier: shards whose documents are known.
        shards: shards whose documents are numbered from 0, in order.
        within: whether a document is left out too if one before it in `shards` has its text.
        scratch: a folder that is made, for 24 bytes a document, and removed.

    Raises:
        UserError: a shard's hashes are not those of its documents.
    """
    known, new = (sum(shard.documents for _, shard in group) for group in (earlier, shards))
    parts = max(1, -(-(known + new) // HASHES_AT_ONCE))
    duplicates = Duplicates(new)
    shutil.rmtree(scratch, ignore_errors=True)  # of a merge that was interrupted
    scratch.mkdir()
    try:
        for rows in _blocks([*earlier, *shards]):
            _divide(rows, parts, scratch)
        for path in scratch.iterdir():
            duplicates.add(_duplicates_of_part(path, known, within) - known)
            path.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return duplicates


def _blocks(shards: Sequence[ShardRef]) -> Iterator[np.ndarray]:
    """Yield the rows of all documents, in order; each array is overwritten by the next."""
    block = np.empty((HASHES_AT_ONCE, ROW), "<u8")
    filled = number = 0
    for folder, shard in shards:
        path = folder / f"{shard.name}.hashes"
        size = path.stat().st_size if path.exists() else 0
        if size != shard.documents * HASH_BYTES:
            raise UserError(
                f"{path} has {size} bytes, not {HASH_BYTES} for each of {shard.documents} documents; remove {folder} "
                "and prepare it again"
            )
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while len(halves := np.fromfile(file, "<u8", 2 * (len(block) - filled)).reshape(-1, 2)):
                digest.update(halves.data)
                rows = block[filled : filled + len(halves)]
                rows[:, :2], rows[:, 2] = halves, np.arange(number, number + len(halves))
                filled, number = filled + len(halves), number + len(halves)
                if filled == len(block):
                    yield block
                    filled = 0
        if digest.hexdigest() != shard.sha256["hashes"]:
            raise UserError(
                f"{path} is damaged: its SHA-256 is not the recorded one; remove {folder} and prepare it again"
            )
    yield block[:filled]


def _divide(rows: np.ndarray, parts: int, scratch: Path) -> None:
    """Append rows, in order, to the files of their hashes' parts."""
    leading = rows[:, 1] >> 32  # of the second halves: the first decide which documents are held out
    part = (leading * np.uint64(parts) >> 32).astype(np.uint16)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(parts + 1))
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            with (scratch / str(number)).open("ab") as file:
                rows[order[start:stop]].tofile(file)


def _duplicates_of_part(path: Path, known: int, within: bool) -> np.ndarray:
    """Return the numbers, counted over all documents, of those in a file that are left out."""
    first_half, second_half, numbers = np.fromfile(path, "<u8").reshape(-1, ROW).T
    order = np.lexsort((second_half, first_half))  # stable, so equal hashes stay in the order of documents
    numbers = numbers[order].astype(np.int64)
    same = [(ordered := half[order])[1:] == ordered[:-1] for half in (first_half, second_half)]
    begins = np.append(True, ~(same[0] & same[1]))  # where another hash begins
    first_copies = numbers[begins][np.cumsum(begins) - 1]
    return np.extract((numbers >= known) & (first_copies < (numbers if within else known)), numbers)
