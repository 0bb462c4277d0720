"""Files appear whole, once, and on the disk."""

import errno
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.warm import processes
from tostlm.data import PreparationSettings, Tokenizer, merge, prepare
from tostlm.data.preparation.plan import unit_folder
from tostlm.files import atomic_folder, distinct_names, sync_tree, write_atomically


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def _write_own(path: Path, content: str, start: Connection) -> None:
    os.link = no_links
    start.recv()
    write_atomically(path, content, overwrite=False)
    assert path.read_text().startswith("of ")


def test_of_processes_that_write_at_once_one_counts_without_hard_links(tmp_path: Path) -> None:
    for trial in range(5):
        path = tmp_path / f"{trial}.json"
        pipes = [processes.Pipe() for _ in range(4)]
        writers = [
            processes.Process(target=_write_own, args=(path, f"of {n} " * 10_000, pipe[1]))
            for n, pipe in enumerate(pipes)
        ]
        for writer in writers:
            writer.start()
        for pipe in pipes:
            pipe[0].send("now")
        for writer in writers:
            writer.join()
        assert not any(writer.exitcode for writer in writers)
        assert len(set(path.read_text().split("of ")[1:])) == 1
        before = path.read_bytes()
        write_atomically(path, "later", overwrite=False)
        assert path.read_bytes() == before


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes that were forced to the disk."""
    found: set[int] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        found.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", record)
    return found


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in [folder, *folder.rglob("*")] if not path.name.endswith(".lock")}


def test_a_tree_is_forced_to_the_disk(tmp_path: Path, synced: set[int]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("content")
    sync_tree(tmp_path)
    assert synced == inodes(tmp_path)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("content")
    assert inodes(tmp_path) <= synced


def test_all_that_was_prepared_is_forced_to_the_disk(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, synced: set[int]
) -> None:
    out = tmp_path / "out"
    settings = PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2, min_characters=5000)
    prepare(settings, tokenizer, out, workers=1, task=(0, 1))
    assert len(inodes(unit_folder(out, 0))) > 8
    assert inodes(out) <= synced
    synced.clear()
    merge(out)
    assert inodes(out) <= synced


def test_distinct_names_are_distinct() -> None:
    paths = [Path(name) for name in ("a/x", "b/x", "x-1", "c/y.z", "x-0-0")]
    found = distinct_names(paths)
    assert len(set(found)) == len(paths)
    assert found[2:] == ["x-1", "y", "x-0-0"] and all(name.startswith("x-") for name in found[:2])
