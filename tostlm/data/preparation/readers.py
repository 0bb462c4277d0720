"""Records out of a part of a source, read so that a bad one costs itself alone.

Lines of JSON and text files are read here, piece by piece; everything else by `datasets`, as Arrow tables.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from tostlm.data.preparation.sources import WorkUnit, hub_dataset, kind_of
from tostlm.errors import error_summary

PIECE_BYTES = 1 << 18  # read at once
TABLE_ROWS = 256
BOM = b"\xef\xbb\xbf"


class RecordError(NamedTuple):
    """What stands where a record cannot be read."""

    reason: str  # what it is counted as
    detail: str


class SourceRecord(NamedTuple):
    """A row, or why there is none, and where it stands."""

    place: str
    row: Mapping[str, Any] | RecordError


class Reader:
    """The records of one part, in order. `bytes_read` follows how much of the part's files was read."""

    def __init__(self, part: WorkUnit, columns: Sequence[str], largest_record: int) -> None:
        """`columns` are those that will be looked at; a record of more than `largest_record` bytes is not read."""
        self._part, self._columns, self._largest = part, columns, largest_record
        self.bytes_read = 0

    def __iter__(self) -> Iterator[SourceRecord]:
        if self._part.hub is not None:
            index, number = self._part.shard
            shard = hub_dataset(self._part.hub).shard(num_shards=number, index=index, contiguous=True)
            yield from self._tables(shard, f"{self._part.hub} shard {index} of {number}")
            return
        before = 0
        for file in self._part.files:
            try:
                yield from self._file(file)
            except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
                yield SourceRecord(
                    file, RecordError("unreadable file", f"cannot be read to its end: {error_summary(error)}")
                )
            before += Path(file).stat().st_size
            self.bytes_read = before if self._part.byte_range is None else self.bytes_read

    def _file(self, path: str) -> Iterator[SourceRecord]:
        kind = kind_of(path)
        if kind == "lines":
            yield from self._lines(path)
        elif kind == "text":
            yield SourceRecord(path, self._text(path))
        else:
            try:
                dataset = _load(kind, path)
            except Exception as error:  # each reader of `datasets` raises its own kind on broken data
                yield SourceRecord(path, RecordError("unreadable file", f"cannot be read: {error_summary(error)}"))
            else:
                yield from self._tables(dataset, path)

    def _text(self, path: str) -> Mapping[str, Any] | RecordError:
        content = b""
        for piece in self._pieces(path):
            content += piece
            if len(content) > self._largest:
                return self._too_large()
        try:
            return dict.fromkeys(self._columns, content.removeprefix(BOM).decode())
        except UnicodeDecodeError as error:
            return RecordError("invalid UTF-8", f"is no UTF-8: {error}")

    def _lines(self, path: str) -> Iterator[SourceRecord]:
        where = "" if self._part.byte_range is None else f" after byte {self._part.byte_range[0]}"
        lines = split_lines(self._pieces(path), self._largest)
        for number, line in enumerate(lines):
            if line is None:
                yield SourceRecord(f"{path}, record {number}{where}", self._too_large())
            elif line.strip():
                yield SourceRecord(f"{path}, record {number}{where}", parse(line))

    def _too_large(self) -> RecordError:
        return RecordError(
            "record too large", f"is larger than {self._largest} bytes; raise --max-document-bytes to read it"
        )

    def _pieces(self, path: str) -> Iterator[bytes]:
        """The file's content without compression; of a byte range, from its first whole line on to its last."""
        before = self.bytes_read
        with Path(path).open("rb") as raw:
            pieces = decompressed(raw, path)
            if self._part.byte_range is not None:
                pieces = lines_of_range(raw, *self._part.byte_range)
            for piece in pieces:
                self.bytes_read = before + raw.tell() - (self._part.byte_range or (0,))[0]
                yield piece

    def _tables(self, dataset: Any, place: str) -> Iterator[SourceRecord]:
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
                names = table.column_names  # a column may be inside another, or missing, which the message lists
            columns = [_values(table[name]) for name in names]
            for values in zip(*columns, strict=True):
                bad = next((value for value in values if isinstance(value, RecordError)), None)
                yield SourceRecord(f"{place}, record {number}", bad or dict(zip(names, values, strict=True)))
                number += 1


def _load(kind: str | None, path: str) -> Any:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, by us
    options: dict[str, Any] = {"batch_size": TABLE_ROWS} if kind == "parquet" else {}
    return datasets.load_dataset(kind, data_files=[glob.escape(path)], split="train", streaming=True, **options)


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RecordError("invalid UTF-8", f"is no UTF-8: {error}")


def parse(line: bytes) -> Mapping[str, Any] | RecordError:
    """One line of JSON as a row."""
    try:
        row = json.loads(line.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        return RecordError("invalid UTF-8", f"is no UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return RecordError("unreadable record", f"is no JSON: {error_summary(error)}")
    return row if isinstance(row, dict) else RecordError("unreadable record", f"is {str(row)!r:.40}, not a JSON object")


def split_lines(pieces: Iterable[bytes], largest: int) -> Iterator[bytes | None]:
    """Lines of a stream, without their ends; None for one longer than `largest` bytes, which is not kept."""
    held: list[bytes] = []  # of a line whose end has not come
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
    """The content of the lines that begin at byte `start` up to `stop`, whole, whatever the cuts are."""
    begun = start == 0
    raw.seek(max(0, start - 1))
    position = raw.tell()
    while piece := raw.read(PIECE_BYTES):
        end = position + len(piece)
        if not begun:
            cut = piece.find(b"\n") + 1
            if not cut:
                position = end
                if position >= stop:
                    return
                continue
            position, piece, begun = position + cut, piece[cut:], True
            if position >= stop:
                return
        if end >= stop:  # the line that is open at `stop` ends at the first newline from byte stop - 1 on
            cut = piece.find(b"\n", max(0, stop - 1 - position)) + 1
            if cut:
                yield piece[:cut]
                return
        yield piece
        position = end


def decompressed(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """A file's content, piece by piece.

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
    """Frame after frame; `zstandard.open` ends in silence after the first, and where a file is cut short."""
    frame = None
    while piece := raw.read(PIECE_BYTES):
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")
