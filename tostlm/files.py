"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tostlm.errors import UserError


def write_atomically(path: Path, content: bytes | str, *, durable: bool = True, overwrite: bool = True) -> None:
    """Write a file under a temporary name and rename it, so that a reader finds all of it or none.

    The file's folder is made; `durable` forces the content to the disk; without `overwrite` an existing file stays,
    and of several processes that write at once the first counts.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not overwrite:
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                write_atomically(path, data, durable=durable)
        return
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` at the end of the block, or is removed if the block raises.

    All that is in it is forced to the disk first. A folder at `path` is replaced.

    Raises:
        UserError: another process is writing the same folder.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_symlink():
        partial.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, f"another process is writing {path}; wait for it, or choose another folder"):
        try:
            for leftover in partial.iterdir():
                is_folder = leftover.is_dir() and not leftover.is_symlink()
                shutil.rmtree(leftover) if is_folder else leftover.unlink()
            yield partial
            sync_tree(partial)
            if path.is_dir() and any(path.iterdir()):
                _exchange(partial, path)
            else:
                partial.replace(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two folders, at once where the system can."""
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return
    aside = second.with_name(f".{second.name}.replaced")
    second.replace(aside)
    first.replace(second)
    aside.replace(first)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return the JSON objects of a file's lines, and the other lines: half of one, left by a crash, or damaged ones.

    A file that does not exist has no lines.
    """
    objects: list[dict[str, Any]] = []
    others: list[bytes] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        value = read_json_object(line)
        if value is None:
            others.append(line)
        else:
            objects.append(value)
    return objects, others


def read_json_object(line: bytes | str) -> dict[str, Any] | None:
    """Return the JSON object that a line holds; None if it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    return value if isinstance(value, dict) else None


def append_json_line(path: Path, value: Mapping[str, object]) -> None:
    """Append a JSON object to a file of lines, on a line of its own whatever was written last."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(value).encode() + b"\n")


def sync_tree(folder: Path) -> None:
    """Force every file in a folder and its folders to the disk, and the lists of their files."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Force the list of a folder's files to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(folder: Path) -> None:
    """Make a folder and check that files can be written in it.

    Raises:
        UserError: it cannot be made or written.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another folder or free it") from None


def require_file_writable(path: Path) -> None:
    """Make the folder of a file and check that the file can be written.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    require_writable(path.parent)


@contextmanager
def locked(path: Path, message: str | None = None) -> Iterator[None]:
    """Hold a lock on a file, or on a folder that exists, which ends with the process at the latest.

    Without a `message` it waits for the lock.

    Raises:
        UserError: another process holds it; `message` is what the user reads.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if message else 0))
        except BlockingIOError:
            raise UserError(message) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def lock_for_life(path: Path, message: str) -> None:
    """Lock a file until this process ends.

    Raises:
        UserError: another process holds it; `message` is what the user reads.
    """
    _for_life.enter_context(locked(path, message))


_for_life = ExitStack()


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of some paths without suffixes, numbered where two are the same."""
    names, found = [path.stem for path in paths], list[str]()
    for index, name in enumerate(names):
        own = name if names.count(name) == 1 else f"{name}-{index}"
        while own in found or (own != name and own in names):
            own += f"-{index}"
        found.append(own)
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of different folders, as many of them as tell these apart."""
    names = list(map(str, folders))
    for count in range(1, max((len(folder.parts) for folder in folders), default=0) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Return rows of cells as lines of text with columns below each other, those in `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def format_bytes(size: float) -> str:
    """Return a size in the largest unit of 1,024 that it fills, in four digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
