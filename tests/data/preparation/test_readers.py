"""Records come out whatever the pieces are, and a bad one costs itself alone."""

import bz2
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tostlm.data.preparation import json_values, readers
from tostlm.data.preparation.decompression import DAMAGE, decompressed
from tostlm.data.preparation.json_values import JSONDamage, read_json_values
from tostlm.data.preparation.readers import Reader, RecordError, parse, read_lines
from tostlm.data.preparation.selection import Selection, Selector
from tostlm.data.preparation.sources import WorkUnit, list_work_units
from tostlm.errors import UserError

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
    return [
        row if isinstance(row, RecordError) else row.get("text", "") for row in rows(Reader(unit, ["text"], largest))
    ]


def rows(reader: Reader) -> Iterator[Mapping[str, Any] | RecordError]:
    return (row for some in reader for row in some.rows if row is not None)


def joined(read: Iterator[list[bytes | None]]) -> list[bytes | None]:
    return list(itertools.chain.from_iterable(read))


def reasons(found: list[object]) -> list[object]:
    return [row.reason if isinstance(row, RecordError) else row for row in found]


@given(lines=LINES, largest=st.integers(0, 12), piece=st.integers(1, 20))
def test_lines_that_are_too_large_cost_themselves_alone(lines: list[bytes], largest: int, piece: int) -> None:
    content = b"\n".join(lines)
    whole = [line.removesuffix(b"\n") for line in io.BytesIO(content)]
    expected = [line if len(line) <= largest else None for line in whole]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece)
        assert joined(read_lines(io.BytesIO(content), largest)) == expected


@settings(max_examples=300)
@given(lines=LINES, cuts=st.lists(st.integers(0, 250), max_size=6), ended=st.booleans(), piece=st.integers(1, 20))
def test_every_line_is_in_one_range(lines: list[bytes], cuts: list[int], ended: bool, piece: int) -> None:
    content = b"\n".join(lines) + b"\n" * ended
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece)
        read = [line for r in itertools.pairwise(edges) for line in joined(read_lines(io.BytesIO(content), 12, *r))]
    assert read == [line.removesuffix(b"\n") for line in io.BytesIO(content)]


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
        with pytest.raises(DAMAGE):
            read(stored[:-cut])


@settings(max_examples=300)
@given(line=st.binary(max_size=40) | st.text(max_size=20).map(str.encode) | st.from_regex(rb'\A\{"text": .{0,20}\}\Z'))
def test_any_line_is_a_row_or_a_reason(line: bytes) -> None:
    assert isinstance(parse(line), dict | RecordError) or not line.strip()


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


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json.xz", "txt.bz2", "jsonl.zst", "parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", bytes(100)])
def test_a_file_without_content_is_damaged_where_its_format_has_some(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "c.jsonl").touch()
    (unit,) = list_work_units([str(tmp_path)])
    assert reasons([row.get("text") if isinstance(row, dict) else row for row in rows(Reader(unit, ["text"], 99))]) == [
        "unreadable file",
        "b",
    ]


def test_columns_of_the_same_name(tmp_path: Path) -> None:
    column = pyarrow.array(["a"])
    table = pyarrow.table([column, column, column], ["text", "text", "other"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        (found,) = records(tmp_path / name)
        assert isinstance(found, RecordError)
        assert "it has 'text' as the name of more than one column" in found.detail


def test_a_long_number_in_json_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"text": "two", "n": -{"9" * 5000}}}, {{"text": "three", "n": 12}}]')
    assert records(tmp_path / "a.json", largest=10_000) == ["two", "three"]


@pytest.mark.parametrize("kind", [pyarrow.timestamp("us"), pyarrow.date32()])
def test_a_date_that_python_has_not_costs_one_record(tmp_path: Path, kind: pyarrow.DataType) -> None:
    number = pyarrow.int32() if kind == pyarrow.date32() else pyarrow.int64()
    dates = pyarrow.array([0, 1 << (number.bit_width - 2), 3], number).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"], "when": dates}), tmp_path / "a.parquet")
    unit = WorkUnit(bytes=None, files=(str(tmp_path / "a.parquet"),))
    found = list(rows(Reader(unit, ["text", "when"], 1000)))
    texts = [row.reason if isinstance(row, RecordError) else row["text"] for row in found]
    assert texts == ["one", "unreadable record", "three"]


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
        read += [row["text"] for row in rows(reader) if not isinstance(row, RecordError)]
        assert reader.bytes_read == unit.bytes
    assert read == texts


def test_a_parquet_footer_with_damaged_statistics(tmp_path: Path) -> None:
    """Of a column in the second row group; pyarrow's own view of it would end the process."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["first", "second"]}), path, row_group_size=1)
    content = path.read_bytes()
    for at in range(len(content) - 500, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        assert len(records(path)) <= 3


def test_an_arrow_file_whose_texts_lie_outside_of_it(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["first", "second", "third"]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    ends = b"".join(end.to_bytes(4, "little") for end in (0, 5, 11, 16))
    assert content.count(ends) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(ends, ends[:4] + (1 << 30).to_bytes(4, "little") + ends[8:]))
    assert reasons(records(tmp_path / "a.arrow")) == ["unreadable file"]


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_an_arrow_file_that_ends_in_its_middle(tmp_path: Path, new: Callable[..., Any]) -> None:
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": ["first", "second", "third"]})
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    content = path.read_bytes()
    assert records(path) == ["first", "second", "third"]
    begin = content.index(b"first")  # of the message after it
    message = next(at for at in range(-(-begin // 8) * 8, len(content), 8) if content[at : at + 4] == b"\xff" * 4)
    path.write_bytes(content[: message + 4] + bytes(4) + content[message + 8 :])
    assert reasons(records(path)) == ["first", "unreadable file"]
    path.write_bytes(content[: content.index(b"third") + 64])
    assert reasons(records(path))[-1] == "unreadable file"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def read_values(content: bytes, piece: int, largest: int = 10_000) -> list[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "PIECE_BYTES", piece)
        return list(read_json_values(io.BytesIO(content), largest))


@settings(max_examples=300)
@given(
    values=st.lists(VALUES, max_size=6),
    in_array=st.booleans(),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    bom=st.sampled_from([b"", readers.BOM]),
    piece=st.integers(1, 40),
)
def test_json_files_hold_what_json_reads(
    values: list[object], in_array: bool, ascii_only: bool, indent: int | None, bom: bytes, piece: int
) -> None:
    if not in_array and values and isinstance(values[0], list):
        values[0] = {"first": values[0]}  # a file that begins with an array holds its elements
    texts = [json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value in values]
    content = json.dumps(values, ensure_ascii=ascii_only, indent=indent) if in_array else " \n".join(texts)
    assert read_values(bom + content.encode(), piece) == values


@settings(max_examples=300)
@given(
    rows=st.lists(st.text(st.characters(exclude_characters="}", codec="utf-8"), max_size=9), min_size=1, max_size=5),
    at=st.integers(0, 10_000),
    byte=st.integers(0, 255),
)
def test_a_damaged_json_file_is_read_up_to_the_damage(rows: list[str], at: int, byte: int) -> None:
    content = bytearray(json.dumps([{"text": row} for row in rows]).encode())
    content[at % len(content)] = byte
    found: list[object] = []
    with suppress(JSONDamage):
        for value in read_json_values(io.BytesIO(bytes(content)), 10_000):
            found.append(value)
    intact = json.dumps([{"text": row} for row in rows]).encode()[: at % len(content)].count(b"}")
    assert found[: min(intact, len(rows))] == [{"text": row} for row in rows][:intact]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"text": "a"}', "the array does not end after value 0"),
        (b'[{"text": "a"} {"text": "b"}]', "no comma after value 0"),
        (b'[{"text": "a"}] x', "something follows the array"),
        (b'[{"text": "a"}, {"text": }]', "value 1 is no JSON: Expecting value"),
        (b'[{"text": "' + b"a" * 400_000, "value 0 is larger than 10000 bytes or has no end"),
        (b"[" * 100_000, "value 0 is nested too deeply"),
    ],
)
def test_json_files_that_end_early(content: bytes, words: str) -> None:
    with pytest.raises(JSONDamage, match=words):
        list(read_json_values(io.BytesIO(content), 10_000))


TRICKY = ['He said "hi"\n', "2024-01-01", "2024-01-01T00:00:00", "12", "1e5", "NaN", "true", "null", "", "{}", "007"]


@pytest.mark.parametrize("bad", [5, 5.5, True, None, ["a"], {"a": "b"}])
def test_no_type_is_guessed_in_json_files(tmp_path: Path, bad: object) -> None:
    """A column of texts that look like something else, and one value that is none, which alone is left out."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in [*TRICKY, bad, *TRICKY]]))
    assert records(path) == [*TRICKY, bad, *TRICKY]
    selector = Selector(Selection(on_error="skip"))
    unit = WorkUnit(bytes=path.stat().st_size, files=(str(path),))
    assert list(selector.documents(Reader(unit, ["text"], 1000))) == 2 * [text for text in TRICKY if text]
    assert selector.dropped == {"no text": 1, "empty": 2}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", [[datetime(2024, 1, 1)], [5], [b"bytes"], [["a"]]], ids=str)
def test_columns_of_tables_that_are_no_text_are_refused(tmp_path: Path, kind: str, column: list[object]) -> None:
    table = pyarrow.table({"text": column})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    selector = Selector(Selection(on_error="skip"))
    unit = WorkUnit(bytes=path.stat().st_size, files=(str(path),))
    assert not list(selector.documents(Reader(unit, ["text"], 1000)))
    assert selector.dropped == {"no text": 1}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@settings(max_examples=100)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_compressed_file_is_no_crash(suffix: str, at: int, bit: int) -> None:
    texts = [json.dumps({"text": f"a document {number * number}"}) + "\n" for number in range(300)]
    content = bytearray(COMPRESS[suffix]("".join(texts).encode()))
    content[at % len(content)] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.jsonl{suffix}")
        path.write_bytes(content)
        found = records(path)
    assert sum(isinstance(row, RecordError) and row.reason == "unreadable file" for row in found) <= 1


class Unreliable(io.FileIO):
    """A file that fails twice, each time further on."""

    failures: ClassVar[list[OSError]] = []

    def readinto(self, buffer: Any) -> int | None:
        if self.failures and self.tell() > 20_000 // len(self.failures):
            raise self.failures.pop()
        return super().readinto(memoryview(buffer)[:5000])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("failures", [2, 9])
def test_what_a_disk_does_not_give_is_read_again_and_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failures: int
) -> None:
    texts = [f"{number}: {random.Random(number).randbytes(90).hex()}" for number in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    content = {"json": json.dumps([{"text": text} for text in texts]), "txt": "".join(texts)}.get(name[2:], lines)
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content.encode()))
    expected = records(path, largest=1 << 20)

    def open_unreliably(self: Path, mode: str) -> io.BufferedReader:
        return io.BufferedReader(Unreliable(str(self)), 5000)

    monkeypatch.setattr(readers, "RETRY_SECONDS", (0.0,) * 3)
    monkeypatch.setattr(Path, "open", open_unreliably)
    Unreliable.failures = [OSError(code, os.strerror(code)) for code in [errno.EIO, errno.ESTALE] * (failures // 2)]
    if failures == 2:
        assert records(path, largest=1 << 20) == expected
        assert not Unreliable.failures
    else:
        with pytest.raises(UserError, match=r"cannot be read now .*(Input/output|Stale).*run the same command again"):
            records(path, largest=1 << 20)
