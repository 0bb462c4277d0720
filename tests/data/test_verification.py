"""A prepared folder is verified once: later starts read only files that changed, and damage is found."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.data import PreparationSettings, Tokenizer, prepare, verify, verify_once
from tostlm.data import verification as verification_module
from tostlm.data.verification import STAMP
from tostlm.errors import UserError
from tostlm.files import sha256_of

Hashed = list[str]  # names of the files that were hashed


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A copy of a prepared folder, without the stamp that another test may have written."""
    return Path(shutil.copytree(data, tmp_path / "copy", ignore=shutil.ignore_patterns(STAMP)))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    names: Hashed = []

    def recorded(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(verification_module, "sha256_of", recorded)
    return names


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".ends", ".hashes"))


def flip_byte(path: Path, keep_mtime: bool = False) -> None:
    """Change one byte of a file; its size stays."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_mtime else 1)))


def test_the_second_verification_reads_no_shard(folder: Path, hashed: Hashed) -> None:
    assert verify_once(folder) == shard_bytes(folder)
    assert len(hashed) == 6
    hashed.clear()
    assert verify_once(folder) == 0
    assert not hashed


def test_a_changed_byte_is_found_and_alone_reread(folder: Path, hashed: Hashed) -> None:
    verify_once(folder)
    hashed.clear()
    flip_byte(folder / "train-00000.bin")
    for _ in range(2):  # the failed verification leaves no stamp that hides the damage
        with pytest.raises(UserError, match=r"train-00000\.bin is damaged: its SHA-256 is not the manifest's"):
            verify_once(folder)
    assert hashed == ["train-00000.bin"] * 2


def test_a_touched_file_with_equal_content_is_reread_once(folder: Path, hashed: Hashed) -> None:
    verify_once(folder)
    hashed.clear()
    path = folder / "heldout-00000.bin"
    os.utime(path, ns=(0, 0))
    assert verify_once(folder) == path.stat().st_size
    assert verify_once(folder) == 0
    assert hashed == [path.name]


def test_a_missing_or_truncated_file_is_found(folder: Path) -> None:
    verify_once(folder)
    (folder / "train-00000.hashes").unlink()
    with pytest.raises(UserError, match=r"train-00000\.hashes is damaged"):
        verify_once(folder)
    os.truncate(folder / "train-00000.bin", 1000)
    with pytest.raises(UserError, match=r"train-00000\.bin has 1000 bytes, its manifest says \d+"):
        verify_once(folder)


def test_a_stamp_of_another_manifest_is_ignored(
    folder: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = PreparationSettings(sources=(str(corpus),), heldout_fraction=0.5)
    prepare(settings, tokenizer, tmp_path / "other")
    verify_once(tmp_path / "other")
    verify_once(folder)
    stamp = json.loads((tmp_path / "other" / STAMP).read_text())
    stamp["files"] = json.loads((folder / STAMP).read_text())["files"]
    (folder / STAMP).write_text(json.dumps(stamp))
    assert verify_once(folder) == shard_bytes(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"content_sha256": 1}', b"\xff"])
def test_a_damaged_stamp_is_ignored(folder: Path, content: bytes) -> None:
    (folder / STAMP).write_bytes(content)
    assert verify_once(folder) == shard_bytes(folder)
    assert verify_once(folder) == 0


@pytest.mark.parametrize("change", [lambda state: [], lambda state: ["x", "y"], lambda state: None])
def test_a_stamp_with_a_damaged_entry_is_ignored(folder: Path, change: Callable[[object], object]) -> None:
    verify_once(folder)
    stamp = json.loads((folder / STAMP).read_text())
    stamp["files"] = {name: change(state) for name, state in stamp["files"].items()}
    (folder / STAMP).write_text(json.dumps(stamp))
    assert verify_once(folder) == shard_bytes(folder)


def test_a_folder_that_cannot_be_written_is_verified_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(verification_module, "write_atomically", refuse)
    assert verify_once(folder) == verify_once(folder) == shard_bytes(folder)
    assert not (folder / STAMP).exists()


def test_the_command_reads_every_byte_whatever_the_stamp_says(folder: Path) -> None:
    assert "8 files match" in succeed(tostlm("data", "verify", str(folder)))
    assert verify_once(folder) == 0  # the command wrote the stamp
    flip_byte(folder / "train-00000.bin", keep_mtime=True)
    assert verify_once(folder) == 0  # neither size nor modification time show the damage
    fail(tostlm("data", "verify", str(folder)), "train-00000.bin is damaged")


def test_a_partial_verification_writes_no_stamp(folder: Path) -> None:
    assert list(verify(folder, ["train-00000.ends"])) == ["train-00000.ends"]
    assert not (folder / STAMP).exists()


def test_the_second_start_of_a_training_run_reads_no_shard(
    folder: Path, tmp_path: Path, hashed: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tostlm.train import trainer
    from tostlm.train.batches import open_data

    monkeypatch.setattr(trainer, "lock_for_life", lambda *_: None)  # held until this process ends
    config = Run(tmp_path, folder).config()
    for expected in (6, 0):
        hashed.clear()
        trainer.check_run(config, open_data(config, 1))
        assert len(hashed) == expected


def test_a_damaged_report_of_dropped_documents_is_found(folder: Path) -> None:
    assert "dropped.jsonl" in list(verify(folder))
    (folder / "dropped.jsonl").write_text("{}\n")
    fail(tostlm("data", "verify", str(folder)), "dropped.jsonl is damaged")
