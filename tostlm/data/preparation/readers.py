"""Reading the records of a work unit; one that cannot be read does not cost the others.

Lines of JSON and text files are read here, a piece at a time, all other files by `datasets`, as Arrow tables.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from tostlm.data.preparation.sources import WorkUnit, hub_dataset, kind_of
from tostlm.errors import error_summary

if TYPE_CHECKING:
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
            tables = shard.with_format("arrow").iter(batch_size=TABLE_ROWS)
            yield from self._rows(tables, f"{self._unit.hub} shard {index} of {count}")
        for path in self._unit.files:
            before = self.bytes_read
            kind = kind_of(path)
            try:
                if kind == "lines":
                    yield from self._lines(path)
                elif kind == "text":
                    yield SourceRecord(path, self._text(path))
                else:
                    yield from self._rows(_tables_of_file(path, kind), path)
            except (OSError, EOFError, lzma.LZMAError) as error:
                detail = f"cannot be read to its end: {error_summary(error)}"
                yield SourceRecord(path, RecordError("unreadable file", detail))
            if self._unit.byte_range is None:
                self.bytes_read = before + Path(path).stat().st_size

    def _lines(self, path: str) -> Iterator[SourceRecord]:
        before = self.bytes_read
        start, stop = self._unit.byte_range or (0, None)
        where = "" if stop is None else f" after byte {start}"
        with Path(path).open("rb") as raw:
            for number, line in enumerate(read_lines(decompressed(raw, path), self._largest, start, stop)):
                self.bytes_read = before + raw.tell() - start
                if line is None or line.strip():
                    row = self._too_large if line is None else parse(line)
                    yield SourceRecord(f"{path}, record {number}{where}", row)

    def _text(self, path: str) -> Mapping[str, object] | RecordError:
        content = b""
        with Path(path).open("rb") as raw:
            file = decompressed(raw, path)
            while piece := file.read(PIECE_BYTES):
                content += piece
                if len(content) > self._largest:
                    return self._too_large
        try:
            return dict.fromkeys(self._columns, content.removeprefix(BOM).decode())
        except UnicodeDecodeError as error:
            return RecordError("invalid UTF-8", f"is no UTF-8: {error}")

    def _rows(self, tables: Iterator[pyarrow.Table], place: str) -> Iterator[SourceRecord]:
        number = 0
        while True:
            try:
                table = next(tables)
            except StopIteration:
                return
            except Exception as error:  # each reader of `datasets` raises its own kind on broken data
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


def _tables_of_file(path: str, kind: str | None) -> Iterator[pyarrow.Table]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, as records
    options = {"batch_size": TABLE_ROWS} if kind == "parquet" else {}
    dataset = datasets.load_dataset(kind, data_files=[glob.escape(path)], split="train", streaming=True, **options)
    yield from dataset.with_format("arrow").iter(batch_size=TABLE_ROWS)


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


def read_lines(file: BinaryIO, largest: int, start: int = 0, stop: int | None = None) -> Iterator[bytes | None]:
    """Yield the lines that begin at byte `start` up to `stop`, with their ends.

    None stands for a line of more than `largest` bytes before its end, which is never whole in memory.
    """
    if start:
        file.seek(start - 1)
        _skip_line(file)  # it begins before `start`
    while stop is None or file.tell() < stop:
        line = file.readline(largest + 1)
        if not line:
            return
        if len(line) <= largest or line.endswith(b"\n"):
            yield line
        else:
            _skip_line(file)
            yield None


def _skip_line(file: BinaryIO) -> None:
    while (piece := file.readline(PIECE_BYTES)) and not piece.endswith(b"\n"):
        pass


def decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    """Return a file's content as a stream, decompressed by the suffix of its name.

    Reading raises EOFError, OSError or LZMAError where the file is damaged or cut short.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
    opener = openers.get(Path(path.lower()).suffix)
    file: BinaryIO = opener(raw) if opener else raw
    return file


def _open_zstandard(raw: BinaryIO) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), PIECE_BYTES)
