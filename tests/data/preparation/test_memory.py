"""Memory does not grow with the source."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from tests.conftest import fail, tostlm
from tostlm.data import Tokenizer, read_manifest

ENGLISH_ONCE = ("--keep", "language=en", "--dedup")


def write_source(path: Path, speeches: list[str], size: int) -> int:
    """About `size` bytes of records, one in a thousand of English, as one compressed file; returns how many."""
    rows = [{"text": speeches[n % len(speeches)], "language": "en" if n == 0 else "xx"} for n in range(1000)]
    block = "".join(json.dumps(row) + "\n" for row in rows).encode()
    frame = zstandard.compress(block)
    blocks = -(-size // len(block))
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(frame)
    return 1000 * blocks


def peak_memory(source: Path, tokenizer: Path, out: Path, *options: str) -> int:
    """Peak resident bytes of a preparation by one process."""
    command = ["prepare", "--source", str(source), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1"]
    command += options
    # A process inherits the peak of the one that starts it, which is large here, so a small one stands between.
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    command = [sys.executable, "-c", code, sys.executable, "-m", "tostlm", *command]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_ten_times_the_text_takes_no_more_memory(speeches: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    peaks = []
    for size in (50_000_000, 500_000_000):
        write_source(tmp_path / f"{size}.jsonl.zst", speeches, size)
        peaks.append(
            peak_memory(tmp_path / f"{size}.jsonl.zst", tmp_path / "t.model", tmp_path / f"{size}", *ENGLISH_ONCE)
        )
    assert peaks[1] < peaks[0] + 30_000_000


def test_a_record_of_a_hundred_megabytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    good = json.dumps({"text": "good", "language": "en"}) + "\n"
    large = json.dumps({"text": "x " * 50_000_000, "language": "en"}) + "\n"
    (tmp_path / "few.jsonl").write_text(good)
    (tmp_path / "large.jsonl").write_text(good + large + good)
    source, out = tmp_path / "large.jsonl", tmp_path / "out"
    usual = peak_memory(tmp_path / "few.jsonl", tmp_path / "t.model", tmp_path / "few", *ENGLISH_ONCE)
    assert peak_memory(source, tmp_path / "t.model", out, *ENGLISH_ONCE, "--on-error", "skip") < usual + 50_000_000
    assert read_manifest(out).dropped == {"record too large": 1, "duplicate": 1}
    command = ["prepare", "--source", str(source), "--tokenizer", str(tmp_path / "t.model"), "--out", str(out) + "2"]
    fail(tostlm(*command), "large.jsonl, record 1: is larger than 16000000 bytes", "--max-document-bytes", "skip")


@pytest.mark.slow
def test_five_million_short_documents_take_the_memory_of_one_million(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    peaks = []
    for documents in (1_000_000, 5_000_000):
        source = tmp_path / f"{documents}.jsonl"
        with source.open("w") as file:
            file.writelines(f'{{"text": "{n:010d}"}}\n' for n in range(documents))
        peaks.append(peak_memory(source, tmp_path / "t.model", tmp_path / str(documents)))
        splits = read_manifest(tmp_path / str(documents)).splits.values()
        assert sum(split.documents for split in splits) == documents
    print(f"peaks {peaks[0] / 1e6:.0f} and {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] < peaks[0] + 30_000_000


@pytest.mark.slow
def test_fifty_gigabytes_in_less_than_one(speeches: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    records = write_source(tmp_path / "crawl.jsonl.zst", speeches, 50_000_000_000)
    peak = peak_memory(tmp_path / "crawl.jsonl.zst", tmp_path / "t.model", tmp_path / "out", *ENGLISH_ONCE)
    manifest = read_manifest(tmp_path / "out")
    kept = sum(split.documents for split in manifest.splits.values())
    assert kept + sum(manifest.dropped.values()) == records
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak < 1 << 30
