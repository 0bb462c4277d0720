"""The first of documents with the same text is kept, in memory and reading that do not depend on how many there are."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tostlm.data.preparation import dedup
from tostlm.data.preparation.dedup import ShardRef, find_duplicates
from tostlm.data.shards import HASH_BYTES, Shard
from tostlm.errors import UserError
from tostlm.files import sha256_of

# Equal in either half, or with zeros at an end, where numpy compares strings as equal.
HASHES = [bytes(half * 8) for half in ([0], [1], [255])]
TEXTS = [a + b for a in HASHES for b in HASHES] + [bytes(15) + b"\1", b"\1" + bytes(15)]


def write(folder: Path, name: str, hashes: bytes) -> ShardRef:
    (folder / f"{name}.hashes").write_bytes(hashes)
    documents = len(hashes) // HASH_BYTES
    sha256 = {"hashes": hashlib.sha256(hashes).hexdigest()}
    return folder, Shard(name=name, tokens=documents, documents=documents, text_bytes=documents, sha256=sha256)


shards_of_texts = st.lists(st.lists(st.integers(0, len(TEXTS) - 1), max_size=20), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=shards_of_texts, new=shards_of_texts, within=st.booleans(), at_once=st.integers(1, 40))
def test_the_first_is_kept(
    known: list[list[int]], new: list[list[int]], within: bool, at_once: int, tmp_path: Path
) -> None:
    earlier, shards = (
        [write(tmp_path, f"{name}-{n:05d}", b"".join(TEXTS[t] for t in texts)) for n, texts in enumerate(group)]
        for name, group in (("old", known), ("new", new))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "HASHES_AT_ONCE", at_once)
        found = find_duplicates(earlier, shards, within, tmp_path / "scratch")
    seen = {text for texts in known for text in texts}
    expected = []
    for text in (text for texts in new for text in texts):
        expected.append(text not in seen)
        if within:
            seen.add(text)
    first = 0
    for texts in new:
        assert found.kept(first, len(texts)).tolist() == expected[first : first + len(texts)]
        first += len(texts)
    assert found.count == expected.count(False)
    assert not (tmp_path / "scratch").exists()


def test_hashes_of_other_documents_are_refused(tmp_path: Path) -> None:
    folder, shard = write(tmp_path, "old-00000", bytes(160))
    for harm in (lambda path: path.write_bytes(bytes(159)), Path.unlink):
        harm(folder / "old-00000.hashes")
        with pytest.raises(UserError, match=r"old-00000.hashes has \d+ bytes, not 16 for each of 10 documents"):
            find_duplicates([(folder, shard)], [], within=True, scratch=tmp_path / "scratch")
    (folder / "old-00000.hashes").write_bytes(b"\1" + bytes(159))
    with pytest.raises(UserError, match=r"old-00000.hashes is damaged: its SHA-256 is not the recorded one"):
        find_duplicates([(folder, shard)], [], within=True, scratch=tmp_path / "scratch")


MEASURE = """
import json, pathlib, resource, sys, time
from tests.data.preparation.test_dedup import refs
from tostlm.data.preparation.dedup import find_duplicates
folder, *documents = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
earlier, shards = refs(folder, *documents)
before = int(open("/proc/self/io").readline().split()[1])
start = time.monotonic()
count = find_duplicates(earlier, shards, True, folder / "scratch").count
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
print(json.dumps([count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, int(io["rchar"]) - before,
    int(io["wchar"]), time.monotonic() - start]))
"""


def refs(folder: Path, shards: int, documents: int) -> tuple[list[ShardRef], list[ShardRef]]:
    """Shards of random hashes, made if they are not there; the first are known, the last one repeats another."""
    made = []
    for number in range(shards):
        name = f"train-{number:05d}"
        if not (folder / f"{name}.hashes").exists():
            rng = np.random.default_rng(shards // 2 if number == shards - 1 else number)
            (folder / f"{name}.hashes").write_bytes(rng.bytes(HASH_BYTES * documents))
        sha256 = {"hashes": sha256_of(folder / f"{name}.hashes")}
        made.append((folder, Shard(name=name, tokens=documents, documents=documents, text_bytes=0, sha256=sha256)))
    return made[: shards // 5], made[shards // 5 :]


@pytest.mark.slow
def test_five_times_the_documents_take_five_times_the_reading_and_no_more_memory(tmp_path: Path) -> None:
    documents, results = 1_000_000, []
    for shards in (20, 100):  # files of 4 million hashes in both
        (tmp_path / str(shards)).mkdir()
        refs(tmp_path / str(shards), shards, documents)
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(shards)), str(shards), str(documents)]
        # A process inherits the peak of the one that starts it, which is large here, so a small one stands between.
        code = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
        output = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE).stdout
        count, peak, read, written, seconds = json.loads(output)
        print(
            f"{shards} M hashes: peak {peak / 1e6:.0f} MB, read {read / 1e9:.2f} GB, wrote {written / 1e9:.2f} GB, "
            f"{seconds:.0f} s"
        )
        assert count == documents
        results.append((peak, read, written))
    (few, few_read, few_written), (many, many_read, many_written) = results
    all_documents = 100 * documents
    assert many < few + all_documents / 8 + 50_000_000
    assert many_read < 5.1 * few_read
    assert many_read < 1.02 * (2 * HASH_BYTES + 8) * all_documents
    assert many_written < 1.02 * (HASH_BYTES + 8) * all_documents
    assert many_written < 5.1 * few_written
