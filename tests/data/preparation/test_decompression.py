"""Compressed files that hold far more than their size, ask for much memory, or are damaged."""

import bz2
import gzip
import json
import lzma
import resource
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from tests.conftest import fail, succeed, tostlm
from tests.warm import processes
from tostlm.data import Selection, Tokenizer, documents
from tostlm.data.preparation.readers import Reader, RecordError
from tostlm.data.preparation.sources import WorkUnit

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
NEW: dict[str, Callable[[], object]] = {
    ".gz": lambda: gzip.zlib.compressobj(wbits=31),
    ".bz2": bz2.BZ2Compressor,
    ".xz": lzma.LZMACompressor,
    ".zst": lambda: zstandard.ZstdCompressor().compressobj(),
}
BOMB_BYTES = 300_000_000
MEMORY = 150_000_000  # beyond what a process has after its imports


def records(path: Path, largest: int = 100_000, **limits: int) -> list[object]:
    unit = WorkUnit(bytes=path.stat().st_size, files=(str(path),))
    found = (row for some in Reader(unit, ["text"], largest, **limits) for row in some.rows if row is not None)
    return [
        row.reason if isinstance(row, RecordError) else row["text"] if len(row["text"]) < 50 else len(row["text"])
        for row in found
    ]


def bomb(path: Path) -> None:
    """A document and then spaces without end, as one line, text or array."""
    compressor = NEW[path.suffix]()
    begin = b'[{"text": "' if ".json." in path.name else b'{"text": "first"}\n{"text": "'
    spaces = b" " * 10_000_000
    with path.open("wb") as file:
        file.write(compressor.compress(begin))
        for _ in range(BOMB_BYTES // len(spaces)):
            file.write(compressor.compress(spaces))
        file.write(compressor.flush())


def with_little_memory(path: Path, largest: int = 100_000, **limits: int) -> list[object]:
    """What is read by a process that cannot have much more memory than it began with."""
    here, there = processes.Pipe()
    process = processes.Process(target=_with_little_memory, args=(there, path, largest, limits))
    process.start()
    there.close()
    found: list[object] = here.recv()
    process.join()
    return found


def _with_little_memory(there: Connection, path: Path, largest: int, limits: dict[str, int]) -> None:
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others take a gigabyte at once
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    threads = 270_000_000 if path.suffix == ".parquet" else 0  # pyarrow's, each with a heap of its own
    limit = pages * resource.getpagesize() + MEMORY + threads
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    there.send(records(path, largest, **limits))


@pytest.mark.parametrize(
    ("kind", "suffix"), [*(("jsonl", suffix) for suffix in COMPRESS), ("json", ".zst"), ("txt", ".zst")]
)
def test_a_small_file_with_far_more_in_it(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"a.{kind}{suffix}"
    bomb(path)
    assert path.stat().st_size < 500_000
    expected = {"jsonl": ["first", "record too large"], "json": ["unreadable file"], "txt": ["record too large"]}
    assert with_little_memory(path) == expected[kind]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_many_small_streams(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    line = b'{"text": "a"}\n'
    path.write_bytes((COMPRESS[suffix](b"") * 50 + COMPRESS[suffix](line) * 50) * 20)
    assert records(path) == ["a"] * 1000


def test_tables_that_hold_far_more_than_their_size(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["first", " " * (BOMB_BYTES // 3)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema, options=options) as stream:
        stream.write_table(table)
    long = pyarrow.array([" " * 3_000_000]).dictionary_encode()
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), long.dictionary)
    pyarrow.parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "repeated.parquet")
    del table, long, repeated
    for name in ("a.parquet", "a.arrow"):
        assert (tmp_path / name).stat().st_size < 1_000_000
        assert with_little_memory(tmp_path / name, max_window=1 << 22) == ["window too large"]
        assert records(tmp_path / name) == ["first", "record too large"]
    assert with_little_memory(tmp_path / "repeated.parquet", 3_000_000) == [3_000_000] * 300
    assert with_little_memory(tmp_path / "repeated.parquet") == ["record too large"] * 300


def test_a_window_above_the_limit_is_an_error_that_names_the_option(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    line = json.dumps({"text": "far apart"}).encode() + b"\n"
    subprocess.run(["zstd", "--long=30", "-q", "-o", tmp_path / "a.jsonl.zst"], input=line * 9, check=True)
    large = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}]
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(line * 9, filters=large))
    for name in ("a.jsonl.zst", "b.jsonl.xz"):
        assert records(tmp_path / name) == ["window too large"]
        assert records(tmp_path / name, max_window=1 << 30) == ["far apart"] * 9
        command = ["prepare", "--source", str(tmp_path / name), "--tokenizer", str(tmp_path / "t.model")]
        command += ["--out", str(tmp_path / f"out-{name}")]
        fail(tostlm(*command), name, "asks for more than the 134217728 bytes", "raise it", "--max-window-bytes")
        succeed(tostlm(*command, "--max-window-bytes", str(1 << 30)))  # it continues
    fail(tostlm(*command, "--max-window-bytes", "1"), "--max-window-bytes 1", "greater than or equal to 1048576")
    assert len(list(documents([str(tmp_path / "a.jsonl.zst")], Selection(max_window_bytes=1 << 30)))) == 9


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("count", [3, 20_000])
def test_what_was_decompressed_comes_out_before_the_error(tmp_path: Path, suffix: str, count: int) -> None:
    """The checksum at the end is wrong, of the second of two streams."""
    texts = [f"document {number * number}" for number in range(count)]
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, content in ((f"a.jsonl{suffix}", lines), (f"a.json{suffix}", json.dumps(rows).encode())):
        compress = COMPRESS[suffix] if suffix != ".zst" else zstandard.ZstdCompressor(write_checksum=True).compress
        half = len(content) // 2
        stored = bytearray(compress(content[:half]) + compress(content[half:]))
        at = {".gz": -8, ".bz2": -4, ".xz": None, ".zst": -4}[suffix]
        if at is None:  # the check of the last block, before the index and the footer
            at = -12 - 4 * (1 + int.from_bytes(stored[-8:-4], "little")) - 1
        stored[at] ^= 1
        (tmp_path / name).write_bytes(stored)
        found = records(tmp_path / name)
        assert found[-1] == "unreadable file"
        assert found[:-1] == texts
