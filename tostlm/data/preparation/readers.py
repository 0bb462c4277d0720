"""Reading the records of a work unit; one that cannot be read does not cost the others.

JSON and text files are read here, a piece at a time, all other files by `datasets`, as Arrow tables. Nothing guesses
types: a text that looks like a number or a date is a text.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import logging
import lzma
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import orjson

from tostlm.data.preparation.json_values import JSONDamage, read_json_values
from tostlm.data.preparation.sources import WorkUnit, hub_dataset, kind_of
from tostlm.errors import UserError, error_summary

if TYPE_CHECKING:
    import pyarrow

PIECE_BYTES = 1 << 18  # read at once
TABLE_ROWS = 256
BOM = b"\xef\xbb\xbf"
RETRY_SECONDS = (1.0, 4.0, 16.0)  # pauses before a source is read again that a disk or a network did not give
NETWORK_MODULES = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, JSONDamage)  # by which decompressors report damaged files

log = logging.getLogger(__name__)


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
        """Yield the records.

        Raises:
            UserError: a disk or a network does not give a source. Nothing is wrong with its records, so none is left
                out, whatever is left out otherwise.
        """
        if self._unit.hub is not None:
            yield from self._retried(self._hub_records, self._unit.hub)
        for path in self._unit.files:
            before = self.bytes_read
            yield from self._retried(partial(self._file_records, path, before), path)
            if self._unit.byte_range is None:
                self.bytes_read = before + Path(path).stat().st_size

    def _retried(self, read: Callable[[], Iterator[SourceRecord]], source: str) -> Iterator[SourceRecord]:
        """Yield records; when the source does not answer, read it again after a pause, from the next record on."""
        yielded = 0
        for pause in (*RETRY_SECONDS, None):
            try:
                for number, record in enumerate(read()):
                    if number >= yielded:
                        yield record
                        yielded = number + 1
                return
            except Exception as error:
                if not is_transient(error):
                    raise
                if pause is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise UserError(
                        f"{source} cannot be read now ({error_summary(error)}); run the same command again when it "
                        "can: it continues from what is finished"
                    ) from None
                log.warning("%s: %s; it is read again in %.0f s", source, error_summary(error), pause)
                time.sleep(pause)

    def _hub_records(self) -> Iterator[SourceRecord]:
        assert self._unit.hub is not None
        index, count = self._unit.shard
        shard = hub_dataset(self._unit.hub).shard(num_shards=count, index=index, contiguous=True)
        tables = shard.with_format("arrow").iter(batch_size=TABLE_ROWS)
        return self._rows(tables, f"{self._unit.hub} shard {index} of {count}")

    def _file_records(self, path: str, before: int) -> Iterator[SourceRecord]:
        """Yield the records of a file; `before` are the bytes of the unit before it."""
        kind = kind_of(path)
        try:
            if kind == "lines":
                yield from self._lines(path, before)
            elif kind == "json":
                yield from self._json(path, before)
            elif kind == "text":
                yield SourceRecord(path, self._text(path))
            else:
                yield from self._rows(_tables_of_file(path, kind), path)
        except DAMAGE as error:
            if is_transient(error):
                raise
            detail = f"cannot be read to its end: {error_summary(error)}"
            yield SourceRecord(path, RecordError("unreadable file", detail))

    def _json(self, path: str, before: int) -> Iterator[SourceRecord]:
        with Path(path).open("rb") as raw:
            for number, value in enumerate(read_json_values(decompressed(raw, path), self._largest)):
                self.bytes_read = before + raw.tell()
                yield SourceRecord(f"{path}, record {number}", _row_of(value))

    def _lines(self, path: str, before: int) -> Iterator[SourceRecord]:
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
                if is_transient(error):
                    raise
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
    """Yield a file's rows as tables.

    Raises:
        Exception: of any kind, from `datasets`, if the file is damaged.
        EOFError: rows are missing and no library noticed, which happens in files without checksums.
    """
    import datasets
    import pyarrow.parquet

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, as records
    options = {"batch_size": TABLE_ROWS} if kind == "parquet" else {}
    dataset = datasets.load_dataset(kind, data_files=[glob.escape(path)], split="train", streaming=True, **options)
    rows = 0
    for table in dataset.with_format("arrow").iter(batch_size=TABLE_ROWS):
        yield table
        rows += len(table)
    if Path(path.lower()).suffix != f".{kind}":
        return  # compressed as a whole, which has a checksum or a length of its own
    if kind == "parquet" and rows != (expected := pyarrow.parquet.read_metadata(path).num_rows):
        raise EOFError(f"its footer says {expected} rows")
    if kind == "arrow" and not _has_arrow_end(Path(path)):
        raise EOFError("the end of its stream is missing")


def _has_arrow_end(path: Path) -> bool:
    """Return whether an Arrow file has a footer, or as a stream its end mark."""
    with path.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        end = file.read()
    return end.endswith((b"ARROW1", b"\0\0\0\0"))


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
        return _row_of(orjson.loads(line))
    except ValueError:  # json reads more: NaN, numbers and nesting of any size, half of a surrogate pair, a BOM
        pass
    try:
        row = json.loads(line.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        return RecordError("invalid UTF-8", f"is no UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return RecordError("unreadable record", f"is no JSON: {error_summary(error)}")
    return _row_of(row)


def _row_of(value: object) -> dict[str, object] | RecordError:
    if isinstance(value, dict):
        return value
    return RecordError("unreadable record", f"is {str(value)!r:.40}, not a JSON object")


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is of the disk or the network and not of a file's content."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, TimeoutError | ConnectionError) or (isinstance(error, OSError) and error.errno):
            return True
        if type(error).__module__.split(".")[0] in NETWORK_MODULES:
            return True
        error = error.__cause__ or error.__context__
    return False


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

    Reading raises one of `DAMAGE` where the file is damaged or cut short.
    """
    openers: dict[str, Any] = {
        ".gz": gzip.open,
        ".bz2": lambda raw: io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), PIECE_BYTES),
        ".xz": lambda raw: io.BufferedReader(_Streams(raw, lzma.LZMADecompressor), PIECE_BYTES),
        ".zst": _open_zstandard,
    }
    opener = openers.get(Path(path.lower()).suffix)
    file: BinaryIO = opener(raw) if opener else raw
    return file


class _Streams(io.RawIOBase):
    """Compressed streams, one after another, as parallel compressors write them.

    Python's own readers take a damaged stream after the first for the end of the file.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._new = raw, new
        self._stream, self._input = new(), b""
        self._begun = False  # whether the current stream has got any input

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                self._input, self._stream, self._begun = self._stream.unused_data, self._new(), False
            if self._stream.needs_input and not self._input:
                self._input = self._raw.read(PIECE_BYTES)
                if not self._input and self._begun:
                    raise EOFError("it ends in the middle of a compressed stream")
                if not self._input:
                    return 0
            if not self._begun:
                self._input = self._input.lstrip(b"\0")  # xz allows padding between streams
                if not self._input:
                    continue
            self._begun = True
            data = self._stream.decompress(self._input, len(buffer))
            self._input = b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def _open_zstandard(raw: BinaryIO) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), PIECE_BYTES)
