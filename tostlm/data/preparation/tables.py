"""The rows of parquet and arrow files, a few at a time."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tostlm.data.preparation.declared_sizes import arrow_batch_sizes, parquet_page_sizes
from tostlm.data.preparation.decompression import PIECE_BYTES, WindowTooLarge

if TYPE_CHECKING:
    import pyarrow

MIN_ROWS, MAX_ROWS = 8, 256  # read at once
ROWS_BYTES = 1 << 26  # that as many rows take if a file holds one text for all of them
WINDOWS_OF_A_PART = 8  # a page or a batch may take as much as so many windows: those of good files may take 1 GB
ARROW_MAGIC = b"ARROW1\0\0"  # of a file; what follows is a stream, and then a footer


def tables_of_file(path: str, kind: str, columns: Sequence[str], max_window: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield a file's rows, in order.

    Args:
        path: the file.
        kind: "parquet" or "arrow".
        columns: what is needed; all columns come if one of these is none of the file's own.
        max_window: a page or a batch of more than 8 times as many bytes is not read.

    Raises:
        WindowTooLarge: there is such a one.
        Exception: of any kind, from pyarrow, if the file is damaged.
        EOFError: rows are missing and no library noticed, which happens in files without checksums.
    """
    if Path(path.lower()).suffix != f".{kind}":
        raise ValueError(f"a .{kind} file is compressed inside, not as a whole; decompress it")
    rows_of = _parquet if kind == "parquet" else _arrow
    yield from rows_of(path, columns, max_window)


def own_columns(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return those of a table's columns that are needed: all, if one is inside another, or missing.

    Raises:
        ValueError: two of them have the same name.
    """
    own = [name for name in names if name in columns]
    needed = own if set(own) == set(columns) else list(names)
    if doubled := [name for name, count in Counter(needed).items() if count > 1]:
        raise ValueError(f"it has {doubled[0]!r} as the name of more than one column")
    return needed


def _parquet(path: str, columns: Sequence[str], max_window: int) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=PIECE_BYTES) as file:
        chosen = own_columns(file.schema_arrow.names, columns)
        largest = _require_small("page", parquet_page_sizes(Path(path), chosen), max_window)
        at_once = min(max(MIN_ROWS, ROWS_BYTES // (largest + 1)), MAX_ROWS)  # no text is larger than its page
        rows = 0
        for batch in file.iter_batches(at_once, columns=chosen, use_threads=False):
            yield batch
            rows += len(batch)
        if rows != file.metadata.num_rows:
            raise EOFError(f"its footer says {file.metadata.num_rows} rows")


def _arrow(path: str, columns: Sequence[str], max_window: int) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    with Path(path).open("rb") as file:
        if file.read(len(ARROW_MAGIC)) != ARROW_MAGIC:
            file.seek(0)
        start = file.tell()
        _require_small("batch", arrow_batch_sizes(file), max_window)
        file.seek(start)
        with pyarrow.ipc.open_stream(file) as stream:
            names = own_columns(stream.schema.names, columns)
            for batch in stream:
                for name in names:
                    _require_sound(batch[name])
                for start in range(0, len(batch), MAX_ROWS):
                    yield batch.select(names).slice(start, MAX_ROWS)
        file.seek(-4, io.SEEK_CUR)
        if file.read(4) != b"\0\0\0\0":
            raise EOFError("the end of its stream is missing")
        end = file.tell()
        if end != file.seek(0, io.SEEK_END):
            footer_end = file.seek(-10, io.SEEK_END)  # its length and the magic come last
            if footer_end - end != int.from_bytes(file.read(4), "little"):
                raise EOFError("its stream ends before the file")


def _require_sound(column: pyarrow.Array) -> None:
    """Check what pyarrow relies on: places outside of the column would be read, or end the process.

    Whether a text is UTF-8 is not checked here, as that costs a record and not the batch.
    """
    import pyarrow

    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    column.view(binary.get(column.type, column.type)).validate(full=True)


def _require_small(part: str, sizes: Iterable[int], max_window: int) -> int:
    """Return the largest of some sizes, none of which is too large."""
    largest = 0
    for size in sizes:
        largest = max(largest, size)
        if size > WINDOWS_OF_A_PART * max_window:
            rule = f"more than {WINDOWS_OF_A_PART} times the {max_window} bytes that --max-window-bytes allows"
            raise WindowTooLarge(f"a {part} of it takes {size} bytes, {rule}; raise it to read the file")
    return largest
