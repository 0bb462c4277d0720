"""Reading the records of a work unit; one that cannot be read does not cost the others.

Lines of JSON and text files are read here, a piece at a time, all other files by `datasets`, as Arrow tables.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import zstandard

from tostlm.data.preparation.sources import WorkUnit, hub_dataset, kind_of
from tostlm.errors import error_summary

if TYPE_CHECKING:
    import datasets
    import pyarrow

PIECE_BYTES = 1 << 18  # read at once
TABLE_ROWS = 256
BOM = b"\xef\xbb\xbf"


class RecordError(NamedTuple):
    """Why a record cannot be used."""

    reason: str  # by which it is counted
    detail: str


class SourceRecord(NamedTuple):
    """The columns of a record, or why they cannot be read, and the place of the record in its source."""

    place: str
    row: Mapping[str, object] | RecordError


class Reader:
    """Iterates over the records of one work unit, in order.

    `bytes_read` is how many bytes of the unit's files were read so far, as they are on disk.

    Args:
        unit: the work unit.
        columns: the columns that are needed.
        largest_record: bytes; a larger record is a `RecordError`, and is never in memory.
    """

    def __init__(self, unit: WorkUnit, columns: Sequence[str], largest_record: int) -> None:
        self._unit, self._columns, self._largest = unit, columns, largest_record
        self._too_large = RecordError(
            "record too large", f"is larger than {largest_record} bytes; raise --max-document-bytes to read it"
        )
        self.bytes_read = 0

    def __iter__(self) -> Iterator[SourceRecord]:
        if self._unit.hub is not None:
            index, count = self._unit.shard
            shard = hub_dataset(self._unit.hub).shard(num_shards=count, index=index, contiguous=True)
            yield from self._tables(shard, f"{self._unit.hub} shard {index} of {count}")
            return
        before = 0
        for file in self._unit.files:
            try:
                yield from self._file(file)
            except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
                yield SourceRecord(
                    file, RecordError("unreadable file", f"cannot be read to its end: {error_summary(error)}")
                )
            before += Path(file).stat().st_size
            self.bytes_read = before if self._unit.byte_range is None else self.bytes_read

    def _file(self, path: str) -> Iterator[SourceRecord]:
        kind = kind_of(path)
        if kind == "lines":
            yield from self._lines(path)
        elif kind == "text":
            yield SourceRecord(path, self._text(path))
        else:
            import datasets

            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, as records
            options = {"batch_size": TABLE_ROWS} if kind == "parquet" else {}
            files = [glob.escape(path)]
            try:
                dataset = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)
            except Exception as error:  # each reader of `datasets` raises its own kind on broken data
                yield SourceRecord(path, RecordError("unreadable file", f"cannot be read: {error_summary(error)}"))
            else:
                yield from self._tables(dataset, path)

    def _text(self, path: str) -> Mapping[str, object] | RecordError:
        content = b""
        for piece in self._pieces(path):
            content += piece
            if len(content) > self._largest:
                return self._too_large
        try:
            return dict.fromkeys(self._columns, content.removeprefix(BOM).decode())
        except UnicodeDecodeError as error:
            return RecordError("invalid UTF-8", f"is no UTF-8: {error}")

    def _lines(self, path: str) -> Iterator[SourceRecord]:
        where = "" if self._unit.byte_range is None else f" after byte {self._unit.byte_range[0]}"
        for number, line in enumerate(split_lines(self._pieces(path), self._largest)):
            if line is None or line.strip():
                row = self._too_large if line is None else parse(line)
                yield SourceRecord(f"{path}, record {number}{where}", row)

    def _pieces(self, path: str) -> Iterator[bytes]:
        """Yield the file's content, decompressed, or the lines that begin in the unit's byte range."""
        before = self.bytes_read
        start, stop = self._unit.byte_range or (0, None)
        with Path(path).open("rb") as raw:
            for piece in decompressed(raw, path) if stop is None else lines_of_range(raw, start, stop):
                self.bytes_read = before + raw.tell() - start
                yield piece

    def _tables(self, dataset: datasets.IterableDataset, place: str) -> Iterator[SourceRecord]:
        number = 0
        tables = dataset.with_format("arrow").iter(batch_size=TABLE_ROWS)
        while True:
            try:
                table = next(tables)
            except StopIteration:
                return
            except Exception as error:
                detail = f"cannot be read after {number} records: {error_summary(error.__cause__ or error)}"
                yield SourceRecord(place, RecordError("unreadable file", detail))
                return
            names = [name for name in table.column_names if name in self._columns]
            if len(names) < len(self._columns):
                names = table.column_names  # one may be inside another column, or missing: the message lists them all
            columns = [_values(table[name]) for name in names]
            for values in zip(*columns, strict=True):
                bad = next((value for value in values if isinstance(value, RecordError)), None)
                yield SourceRecord(f"{place}, record {number}", bad or dict(zip(names, values, strict=True)))
                number += 1


def _values(column: pyarrow.ChunkedArray) -> list[object]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pyarrow.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RecordError("invalid UTF-8", f"is no UTF-8: {error}")


def parse(line: bytes) -> dict[str, object] | RecordError:
    """Return the JSON object in a line."""
    try:
        row = json.loads(line.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        return RecordError("invalid UTF-8", f"is no UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return RecordError("unreadable record", f"is no JSON: {error_summary(error)}")
    return row if isinstance(row, dict) else RecordError("unreadable record", f"is {str(row)!r:.40}, not a JSON object")


def split_lines(pieces: Iterable[bytes], largest: int) -> Iterator[bytes | None]:
    """Yield the lines of a stream without their ends; None for one longer than `largest` bytes, which is not kept."""
    held: list[bytes] = []  # of the line whose end is not read yet
    size = 0
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for line in ended:
            yield None if size + len(line) > largest else b"".join([*held, line])
            held, size = [], 0
        size += len(rest)
        if size <= largest:
            held.append(rest)
        else:
            held.clear()
    if size:
        yield None if size > largest else b"".join(held)


def lines_of_range(raw: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yield the lines that begin at byte `start` up to `stop`, whole, in pieces of at most `PIECE_BYTES`."""
    position = raw.seek(max(0, start - 1))
    begun = start == 0
    while piece := raw.readline(PIECE_BYTES):
        if begun:
            yield piece
        position += len(piece)
        if piece.endswith(b"\n"):
            begun = True
            if position >= stop:
                return


def decompressed(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield a file's content in pieces, decompressed by the suffix of its name.

    Raises:
        EOFError, OSError, LZMAError, ZstdError: it is damaged or cut short.
    """
    suffix = Path(path.lower()).suffix
    if suffix == ".zst":
        yield from _zstandard(raw)
        return
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix)
    file = opener(raw) if opener else raw
    while piece := file.read(PIECE_BYTES):
        yield piece


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    """Yield all frames of a file; `zstandard.open` stops after the first, and is silent if a file is cut short."""
    frame = None
    while piece := raw.read(PIECE_BYTES):
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")
