"""Reading the records of a work unit; one that cannot be read does not cost the others.

JSON and text are read a piece at a time, tables a few rows, datasets of the hub by `datasets`. Nothing guesses types: a
text that looks like a number or a date is a text.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import orjson

from tostlm.data.preparation.decompression import (
    DAMAGE,
    MAX_WINDOW_BYTES,
    PIECE_BYTES,
    WindowTooLarge,
    decompressed,
)
from tostlm.data.preparation.json_values import JSONDamage, read_json_values
from tostlm.data.preparation.sources import WorkUnit, hub_dataset, kind_of
from tostlm.data.preparation.tables import MAX_ROWS, own_columns, tables_of_file
from tostlm.errors import UserError, error_summary

if TYPE_CHECKING:
    import pyarrow

BOM = b"\xef\xbb\xbf"
RETRY_SECONDS = (1.0, 4.0, 16.0)  # pauses before a source is read again that a disk or a network did not give
NETWORK_MODULES = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")

NO_PYTHON_VALUE = (ValueError, OverflowError, LookupError)  # a date that Python has not, a time zone that none knows

log = logging.getLogger(__name__)


class RecordError(NamedTuple):
    """Why a record cannot be used."""

    reason: str  # by which it is counted
    detail: str


class Records(NamedTuple):
    """Consecutive records of one source, for each of which `rows` has the columns, or why they cannot be read.

    None in `rows` is a line without a record.
    """

    source: str
    first: int | None  # number of the first in the source; None if the only one stands for all of it
    rows: Sequence[Mapping[str, object] | RecordError | None]

    def place(self, index: int) -> str:
        """Return how an error names one of the records."""
        return self.source if self.first is None else f"{self.source}, record {self.first + index}"

    def after(self, count: int) -> Records:
        """Return all but the first `count` records."""
        return self._replace(first=None if self.first is None else self.first + count, rows=self.rows[count:])


class Reader:
    """Iterates over the records of one work unit, in order, some at a time.

    Args:
        unit: the work unit.
        columns: the columns that are needed.
        largest_record: bytes; a larger record is a `RecordError`, and is never in memory.
        max_window: bytes that a decompressor may take for what it remembers of the content.
    """

    def __init__(
        self, unit: WorkUnit, columns: Sequence[str], largest_record: int, max_window: int = MAX_WINDOW_BYTES
    ) -> None:
        self._unit, self._columns, self._largest, self._max_window = unit, columns, largest_record, max_window
        self._too_large = RecordError(
            "record too large", f"is larger than {largest_record} bytes; raise --max-document-bytes to read it"
        )
        self._bytes_before = 0  # of the file that is read now, in the unit
        self._position: Callable[[], int] = int  # in that file, 0 if there is none

    @property
    def bytes_read(self) -> int:
        """How many bytes of the unit's files were read so far, as they are on disk."""
        return self._bytes_before + self._position()

    def __iter__(self) -> Iterator[Records]:
        """Yield the records, as many at a time as take little memory.

        Raises:
            UserError: a disk or a network does not give a source. Nothing is wrong with its records, so none is left
                out, whatever is left out otherwise.
        """
        if self._unit.hub is not None:
            yield from self._retried(self._hub_records, self._unit.hub)
        for path in self._unit.files:
            yield from self._retried(partial(self._file_records, path), path)
            start, stop = self._unit.byte_range or (0, Path(path).stat().st_size)
            self._bytes_before += stop - start

    def _retried(self, read: Callable[[], Iterator[Records]], source: str) -> Iterator[Records]:
        """Yield records; when the source does not answer, read it again after a pause, from the next record on."""
        yielded = 0
        for pause in (*RETRY_SECONDS, None):
            try:
                number = 0
                for records in read():
                    number += len(records.rows)
                    if number > yielded:
                        new, yielded = number - yielded, number
                        yield records.after(len(records.rows) - new)
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

    def _hub_records(self) -> Iterator[Records]:
        assert self._unit.hub is not None
        index, count = self._unit.shard
        shard = hub_dataset(self._unit.hub).shard(num_shards=count, index=index, contiguous=True)
        tables = shard.with_format("arrow").iter(batch_size=MAX_ROWS)
        return self._rows(tables, f"{self._unit.hub} shard {index} of {count}")

    def _file_records(self, path: str) -> Iterator[Records]:
        kind = kind_of(path)
        try:
            if kind == "lines":
                yield from self._lines(path)
            elif kind == "json":
                yield from self._json(path)
            elif kind == "text":
                yield Records(path, None, [self._text(path)])
            elif kind:
                yield from self._rows(tables_of_file(path, kind, self._columns, self._max_window), path)
        except WindowTooLarge as error:
            yield Records(path, None, [RecordError("window too large", f"cannot be read: {error}")])
        except (*DAMAGE, JSONDamage) as error:
            if is_transient(error):
                raise
            detail = f"cannot be read to its end: {error_summary(error)}"
            yield Records(path, None, [RecordError("unreadable file", detail)])

    @contextmanager
    def _opened(self, path: str, start: int = 0) -> Iterator[BufferedIOBase]:
        """Open a file, decompressed, of which the unit's part begins at byte `start`."""
        with Path(path).open("rb") as raw:
            self._position = lambda: max(0, raw.tell() - start)
            try:
                yield decompressed(raw, path, self._max_window)
            finally:
                self._position = int

    def _json(self, path: str) -> Iterator[Records]:
        with self._opened(path) as file:
            for number, value in enumerate(read_json_values(file, self._largest)):
                yield Records(path, number, [_row_of(value)])

    def _lines(self, path: str) -> Iterator[Records]:
        start, stop = self._unit.byte_range or (0, None)
        source = path if stop is None else f"{path} after byte {start}"
        with self._opened(path, start) as file:
            number = 0
            for lines in read_lines(file, self._largest, start, stop):
                yield Records(source, number, [self._too_large if line is None else parse(line) for line in lines])
                number += len(lines)

    def _text(self, path: str) -> Mapping[str, object] | RecordError:
        content = b""
        with self._opened(path) as file:
            while piece := file.read(PIECE_BYTES):
                content += piece
                if len(content) > self._largest:
                    return self._too_large
        try:
            return dict.fromkeys(self._columns, content.removeprefix(BOM).decode())
        except UnicodeDecodeError as error:
            return RecordError("invalid UTF-8", f"is no UTF-8: {error}")

    def _rows(self, tables: Iterator[pyarrow.Table | pyarrow.RecordBatch], place: str) -> Iterator[Records]:
        number = 0
        while True:
            try:
                table = next(tables)
            except StopIteration:
                return
            except Exception as error:  # pyarrow and `datasets` raise many kinds on broken data
                if is_transient(error) or isinstance(error, WindowTooLarge):
                    raise
                detail = f"cannot be read after {number} records: {error_summary(error.__cause__ or error)}"
                yield Records(place, None, [RecordError("unreadable file", detail)])
                return
            names = own_columns(table.schema.names, self._columns)
            rows = 1 if table.nbytes > PIECE_BYTES else len(table)
            for start in range(0, len(table), rows):
                yield Records(place, number + start, self._rows_of(table.slice(start, rows), names))
            number += len(table)

    def _rows_of(
        self, table: pyarrow.Table | pyarrow.RecordBatch, names: Sequence[str]
    ) -> list[dict[str, object] | RecordError]:
        rows = []
        for values in zip(*(self._values(table[name]) for name in names), strict=True):
            bad = next((value for value in values if isinstance(value, RecordError)), None)
            rows.append(bad or dict(zip(names, values, strict=True)))
        return rows

    def _values(self, column: pyarrow.Array | pyarrow.ChunkedArray) -> Iterable[object]:
        if column.nbytes <= self._largest:
            with suppress(*NO_PYTHON_VALUE):  # of one value: which one is found below
                values: list[object] = column.to_pylist()
                return values
        return map(self._value, column)

    def _value(self, scalar: pyarrow.Scalar) -> object:
        if hasattr(scalar, "dictionary"):
            scalar = scalar.value
        content = scalar.as_buffer() if hasattr(scalar, "as_buffer") else None  # of a text; None of null
        if content is not None and len(content) > self._largest:
            return self._too_large
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            return RecordError("invalid UTF-8", f"is no UTF-8: {error}")
        except NO_PYTHON_VALUE as error:
            return RecordError("unreadable record", f"holds what cannot be read: {error_summary(error)}")


def parse(line: bytes) -> dict[str, object] | RecordError | None:
    """Return the JSON object in a line, or None if nothing is in it."""
    try:
        return _row_of(orjson.loads(line))
    except ValueError:  # json reads more: NaN, numbers and nesting of any size, half of a surrogate pair, a BOM
        if not line.strip():
            return None
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


def read_lines(
    file: BufferedIOBase, largest: int, start: int = 0, stop: int | None = None
) -> Iterator[list[bytes | None]]:
    """Yield the lines that begin at byte `start` up to `stop`, without their ends, some at a time.

    None stands for a line of more than `largest` bytes, which is never whole in memory.
    """
    if start:
        file.seek(start - 1)
        _skip_line(file)  # it begins before `start`
    while stop is None or file.tell() < stop:
        piece = file.read1(PIECE_BYTES if stop is None else min(PIECE_BYTES, stop - file.tell()))
        if not piece:
            return
        *lines, last = piece.split(b"\n")
        yield [None if len(line) > largest else line for line in lines]
        if last:
            last += file.readline(largest + 1)
            if not last.endswith(b"\n") and len(last) > largest:
                _skip_line(file)
            yield [None if len(last.removesuffix(b"\n")) > largest else last.removesuffix(b"\n")]


def _skip_line(file: BufferedIOBase) -> None:
    while (piece := file.readline(PIECE_BYTES)) and not piece.endswith(b"\n"):
        pass
