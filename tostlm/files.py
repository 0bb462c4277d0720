"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tostlm.errors import UserError


def write_atomically(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Write a file beside `path`, `durable` on disk for good, then put it in its place: whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Put on disk for good which files a folder holds."""
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
    """Make `folder`, or say why nothing can be written in it.

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
    """Make a file's folder, or say why the file cannot be written.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    require_writable(path.parent)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock on a file; a process that ends, however it ends, lets go of it.

    Raises:
        UserError: another process holds it; `message` says of what.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(message) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def lock_for_life(path: Path, message: str) -> None:
    """Lock a file until this process ends.

    Raises:
        UserError: another process holds it; `message` says of what.
    """
    _for_life.enter_context(locked(path, message))


_for_life = ExitStack()


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of some paths without suffix, numbered where two are the same."""
    names = [path.stem for path in paths]
    return [f"{name}-{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]
