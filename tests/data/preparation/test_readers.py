"""Records come out whatever the pieces are, and a bad one costs itself alone."""

import bz2
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tostlm.data.preparation import readers
from tostlm.data.preparation.readers import Reader, RecordError, decompressed, parse, read_lines
from tostlm.data.preparation.sources import WorkUnit, list_work_units

LINES = st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=20)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def records(path: Path, *, largest: int = 1000) -> list[object]:
    unit = WorkUnit(bytes=path.stat().st_size, files=(str(path),))
    return [row if isinstance(row, RecordError) else row["text"] for _, row in Reader(unit, ["text"], largest)]


def reasons(found: list[object]) -> list[object]:
    return [row.reason if isinstance(row, RecordError) else row for row in found]


@given(lines=LINES, largest=st.integers(0, 12), piece=st.integers(1, 20))
def test_lines_that_are_too_large_cost_themselves_alone(lines: list[bytes], largest: int, piece: int) -> None:
    content = b"\n".join(lines)
    expected = [line if len(line.rstrip(b"\n")) <= largest else None for line in io.BytesIO(content)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece)
        assert list(read_lines(io.BytesIO(content), largest)) == expected


@settings(max_examples=300)
@given(lines=LINES, cuts=st.lists(st.integers(0, 250), max_size=6), ended=st.booleans(), piece=st.integers(1, 20))
def test_every_line_is_in_one_range(lines: list[bytes], cuts: list[int], ended: bool, piece: int) -> None:
    content = b"\n".join(lines) + b"\n" * ended
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece)
        read = [line for r in itertools.pairwise(edges) for line in read_lines(io.BytesIO(content), 12, *r)]
    assert read == list(io.BytesIO(content))


@pytest.mark.parametrize("suffix", COMPRESS)
@settings(max_examples=40)
@given(frames=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=3), cut=st.integers(0, 100))
def test_compressed_files_are_whole_or_an_error(suffix: str, frames: list[bytes], cut: int) -> None:
    stored = b"".join(map(COMPRESS[suffix], frames))

    def read(content: bytes) -> bytes:
        return decompressed(io.BytesIO(content), f"a.jsonl{suffix}").read()

    assert read(stored) == b"".join(frames)  # several frames in a file, as parallel compressors write them
    last = len(COMPRESS[suffix](frames[-1]))
    if suffix and 0 < cut < last:
        with pytest.raises((OSError, EOFError, lzma.LZMAError)):
            read(stored[:-cut])


@settings(max_examples=300)
@given(line=st.binary(max_size=40) | st.text(max_size=20).map(str.encode) | st.from_regex(rb'\A\{"text": .{0,20}\}\Z'))
def test_any_line_is_a_row_or_a_reason(line: bytes) -> None:
    assert isinstance(parse(line), dict | RecordError)


@given(text=st.text())
def test_every_text_comes_through_json(text: str) -> None:
    assert parse(json.dumps({"text": text}).encode()) == {"text": text}


def test_a_bad_record_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    bad = [b'{"text": "\xff"}\n', b"{\n", b"[1]\n", b'{"text": "' + b"x" * 2000 + b'"}\n', b"[" * 5000 + b"\n"]
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n  \n" + good.join(bad) + good)
    assert reasons(records(path, largest=5000)) == [
        "good",
        *("invalid UTF-8", "good", "unreadable record", "good", "unreadable record", "good"),
        *("x" * 2000, "good", "unreadable record", "good"),
    ]
    assert reasons(records(path, largest=1000))[7:9] == ["record too large", "good"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff\u00fcber\n\nline\r\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xff"))
    (tmp_path / "c.txt").write_bytes(b"x" * 2000)
    found = [records(tmp_path / name)[0] for name in ("a.txt", "b.txt.gz", "c.txt")]
    assert reasons(found) == ["\u00fcber\n\nline\r\n", "invalid UTF-8", "record too large"]


def test_invalid_utf8_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    binary = pyarrow.array([b"one", b"\xff\xfe", b"three"], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert reasons(records(tmp_path / "a.parquet")) == ["one", "invalid UTF-8", "three"]


@pytest.mark.parametrize("size", [40, 100, 1000, 10**6])
def test_work_units_hold_every_record_once(tmp_path: Path, size: int) -> None:
    texts = [f"{n} " * (n % 17) + "end" for n in range(200)]
    half = len(texts) // 2
    for name, some in (("a.jsonl", texts[:half]), ("b.jsonl", texts[half:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    (tmp_path / "empty.jsonl").touch()
    units = list_work_units([str(tmp_path)], size)
    assert (len(units) > 2) == (size < 10**4)
    assert sum(unit.bytes or 0 for unit in units) == sum(path.stat().st_size for path in tmp_path.iterdir())
    read = []
    for unit in units:
        reader = Reader(unit, ["text"], 1000)
        read += [row["text"] for _, row in reader if not isinstance(row, RecordError)]
        assert unit.byte_range or reader.bytes_read == unit.bytes
    assert read == texts
