"""Damaged sources of every format: one clear error, or what is left out is counted and the rest comes out.

A case is a format, a kind of damage, and a place, all drawn from its number and the seed.
"""

import bz2
import gzip
import io
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from tostlm.data.preparation.readers import Reader
from tostlm.data.preparation.selection import Selection, Selector
from tostlm.data.preparation.sources import WorkUnit
from tostlm.errors import UserError

pytestmark = pytest.mark.slow

CASES = 2_000
DOCUMENTS = 60
LARGEST = 10_000


def texts(rng: random.Random) -> list[str]:
    """Documents, some of which look like something else than a text."""
    tricky = ['He said "hi"\n', "2024-01-01", "12", "1e5", "NaN", "true", "null", "{}", "[1]", "\u2028 \\ \t", "é€😀"]
    words = ["token", "statistics", "transformer", "naïve", '"quoted"', "\\", "\n", "0", "{", "]", ","]
    return [
        rng.choice(tricky) if rng.random() < 0.2 else " ".join(rng.choices(words, k=rng.randrange(1, 60)))
        for _ in range(DOCUMENTS)
    ]


def lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(documents)).encode()


def array(documents: Sequence[str], indent: int | None = None) -> bytes:
    rows = [{"text": text, "n": n} for n, text in enumerate(documents)]
    return json.dumps(rows, indent=indent, ensure_ascii=False).encode()


def parquet(documents: Sequence[str], compression: str) -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({"text": list(documents), "n": range(len(documents))})
    pyarrow.parquet.write_table(table, file, compression=compression, row_group_size=25)
    return file.getvalue()


def arrow(documents: Sequence[str]) -> bytes:
    table = pyarrow.table({"text": list(documents), "n": range(len(documents))})
    file = io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=25)
    return file.getvalue()


def frames(documents: Sequence[str], compress: Callable[[bytes], bytes]) -> bytes:
    return compress(lines(documents[: DOCUMENTS // 2])) + compress(lines(documents[DOCUMENTS // 2 :]))


FORMATS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "jsonl": lines,
    "json": array,
    "pretty.json": lambda documents: array(documents, indent=2),
    "lines.json": lines,
    "txt": lambda documents: "\n".join(documents).encode(),
    "jsonl.gz": lambda documents: gzip.compress(lines(documents)),
    "frames.jsonl.gz": lambda documents: frames(documents, gzip.compress),
    "jsonl.bz2": lambda documents: frames(documents, bz2.compress),
    "jsonl.xz": lambda documents: frames(documents, lzma.compress),
    "jsonl.zst": lambda documents: zstandard.compress(lines(documents)),
    "frames.jsonl.zst": lambda documents: frames(documents, zstandard.compress),
    "json.zst": lambda documents: zstandard.compress(array(documents)),
    "none.parquet": lambda documents: parquet(documents, "none"),
    "snappy.parquet": lambda documents: parquet(documents, "snappy"),
    "zstd.parquet": lambda documents: parquet(documents, "zstd"),
    "arrow": arrow,
}


def damage(content: bytes, rng: random.Random) -> tuple[bytes, int, str]:
    """Return damaged content, the first damaged byte, and the kind of damage."""
    kind = rng.choice(["flip", "byte", "cut", "delete", "insert", "zeros", "repeat"])
    at = rng.randrange(len(content))
    length = rng.choice([1, 2, 7, 64, 500])
    middle, rest = content[at : at + length], content[at + length :]
    changed = {
        "flip": bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :],
        "byte": bytes([rng.randrange(256)]) + content[at + 1 :],
        "cut": b"",
        "delete": rest,
        "insert": rng.randbytes(length) + content[at:],
        "zeros": bytes(len(middle)) + rest,
        "repeat": middle + content[at:],
    }[kind]
    return content[:at] + changed, at, kind


def read(path: Path, on_error: str) -> tuple[list[str], Counter[str]]:
    selector = Selector(Selection.model_validate({"on_error": on_error, "max_document_bytes": LARGEST}))
    unit = WorkUnit(bytes=path.stat().st_size, files=(str(path),))
    return list(selector.documents(Reader(unit, selector.columns, LARGEST))), selector.dropped


def check(path: Path, original: Sequence[str], intact: int) -> str:
    """Read a damaged file both ways, and return how it ended; `intact` documents lie before the damage."""
    found, dropped = read(path, "skip")
    assert found[:intact] == list(original[:intact])
    assert all(text.encode() for text in found)  # valid UTF-8, and not empty
    try:
        strict, _ = read(path, "fail")
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert dropped.total() > 0
        return "error"
    assert strict == found
    if found == list(original):
        return "harmless"
    return "unseen" if len(found) + dropped.total() >= len(original) else "lost"


def test_damaged_sources(
    tmp_path: Path, seed: int, numbers: Callable[[int], range], capsys: pytest.CaptureFixture[str]
) -> None:
    ended: Counter[tuple[str, str]] = Counter()
    for case in numbers(CASES):
        rng = random.Random(f"{seed}/{case}")
        name = rng.choice(list(FORMATS))
        documents = texts(rng)
        content = FORMATS[name](documents)
        changed, at, kind = damage(content, rng)
        path = tmp_path / f"case.{name}"
        path.write_bytes(changed)
        intact = content[:at].count(b"\n") if name in ("jsonl", "lines.json") else 0
        whole = ["\n".join(documents)] if name == "txt" else documents
        try:
            ended[name, check(path, whole, intact)] += 1
        except Exception as error:
            raise AssertionError(f"case {case} of seed {seed}: {kind} at {at} of {name}") from error
    with capsys.disabled():
        for name in FORMATS:
            counts = {end: ended[name, end] for end in ("error", "harmless", "unseen", "lost")}
            print(f"{name:<18}" + "".join(f"{end} {count:<7}" for end, count in counts.items()))
    for name in FORMATS:
        if name.endswith(("gz", "xz", "bz2")):  # with checksums
            assert not ended[name, "unseen"] + ended[name, "lost"], name
        if name.endswith("parquet"):  # without, but with the number of rows
            assert not ended[name, "lost"], name
        if name.endswith("zst"):  # with lengths: two records may become one of the same length
            assert ended[name, "lost"] * CASES <= ended.total(), name
