"""How much memory a parquet page or an Arrow batch says that it takes, before it is read.

pyarrow takes the memory that a file declares, and where there is less the process may end. What cannot be understood
here is left to pyarrow, which reads the same bytes and reports the damage.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pyarrow.parquet

BUFFER_BYTES = 1 << 12
MALFORMED = (LookupError, ValueError, struct.error, RecursionError)
CONTINUATION = 0xFFFFFFFF  # begins a message of an Arrow stream
RECORD_BATCH, DICTIONARY_BATCH = 3, 2
BOOLEANS, BYTE, INTEGERS, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 8, 12  # of Thrift's compact protocol


def parquet_page_sizes(path: Path, metadata: pyarrow.parquet.FileMetaData, columns: Sequence[str]) -> Iterator[int]:
    """Yield the uncompressed bytes of every page of the columns, by the pages' headers."""
    with path.open("rb", buffering=BUFFER_BYTES) as file:
        for group in range(metadata.num_row_groups):
            chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
            for chunk in chunks:
                if chunk.path_in_schema in columns or chunk.path_in_schema.split(".")[0] in columns:
                    start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
                    yield from _page_sizes(file, start, start + chunk.total_compressed_size)


def _page_sizes(file: BinaryIO, start: int, stop: int) -> Iterator[int]:
    try:
        file.seek(start)
        while file.tell() < stop:
            header = _thrift_integers(file)
            yield header[2]
            file.seek(max(0, header[3]), os.SEEK_CUR)  # the compressed page
    except MALFORMED:
        return


def _thrift_integers(file: BinaryIO) -> dict[int, int]:
    """Read a struct in Thrift's compact protocol; return its integers by the numbers of their fields."""
    integers: dict[int, int] = {}
    number = 0
    while head := file.read(1)[0]:
        number = number + (head >> 4) if head >> 4 else _zigzag(file)
        kind = head & 15
        if kind in INTEGERS:
            integers[number] = _zigzag(file)
        elif kind == BINARY:
            file.seek(_varint(file), os.SEEK_CUR)
        elif kind == STRUCT:
            _thrift_integers(file)
        elif kind == BYTE:
            file.read(1)
        elif kind not in BOOLEANS:
            raise ValueError(f"field {number} of a page's header is of type {kind}")
    return integers


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while (byte := file.read(1)[0]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
    return value | byte << shift


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 ^ -(value & 1)


def arrow_batch_sizes(file: BinaryIO) -> Iterator[int]:
    """Yield the uncompressed bytes of every compressed batch of an Arrow stream that begins here."""
    try:
        while length := _message_length(file):
            message = _Table(file.read(length), 0)
            body = file.tell()
            batch = message.table(2)
            kind = message.number("B", 1)
            batch = batch.table(1) if kind == DICTIONARY_BATCH else batch
            if kind in (RECORD_BATCH, DICTIONARY_BATCH) and batch.has(3):  # a compression
                yield sum(_buffer_sizes(file, body, batch))
            file.seek(body + message.number("q", 3))
    except MALFORMED:
        return


def _message_length(file: BinaryIO) -> int:
    (length,) = struct.unpack("<I", file.read(4))
    return int(struct.unpack("<I", file.read(4))[0] if length == CONTINUATION else length)


def _buffer_sizes(file: BinaryIO, body: int, batch: _Table) -> Iterator[int]:
    for offset, length in batch.pairs(2):
        if length >= 8:
            file.seek(body + offset)
            (size,) = struct.unpack("<q", file.read(8))
            yield length if size == -1 else size  # -1: not compressed


class _Table:
    """A table of a FlatBuffer, whose fields have numbers; at 0 lies the place of the first."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at + self._get("I", at)

    def _get(self, form: str, at: int) -> int:
        (value,) = struct.unpack_from(f"<{form}", self._data, at)
        return int(value)

    def _place(self, field: int) -> int:
        """Return where a field is, 0 if it has its default."""
        fields = self._at - self._get("i", self._at)
        offset = self._get("H", fields + 4 + 2 * field) if 4 + 2 * field < self._get("H", fields) else 0
        return self._at + offset if offset else 0

    def has(self, field: int) -> bool:
        return self._place(field) > 0

    def number(self, form: str, field: int) -> int:
        return self._get(form, self._place(field)) if self.has(field) else 0

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._place(field))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        start = self._place(field) + self._get("I", self._place(field))
        for at in range(start + 4, start + 4 + 16 * self._get("I", start), 16):
            yield self._get("q", at), self._get("q", at + 8)
