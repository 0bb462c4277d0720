"""Whether a checkpoint's files are what was written, by the checksums in its file COMPLETE."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TypedDict

from tostlm.errors import UserError
from tostlm.files import sha256_of

CONFIG, TRAIN_STATE, COMPLETE = "config.yaml", "train_state.json", "COMPLETE"
UNREADABLE = (ValueError, TypeError, LookupError, RecursionError)  # raised by what COMPLETE may hold instead
HASH_THREADS = 4  # files that are hashed at a time


class Checksum(TypedDict):
    """What a file was when it was written."""

    bytes: int
    sha256: str


def find_damage(checkpoint: Path, names: Iterable[str] | None = None) -> str | None:
    """Return how a checkpoint differs from what was written; None if it does not. Files are read whole and hashed.

    Args:
        names: the files to compare, by path in the checkpoint; None for all.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        checksums = _checksums(checkpoint)
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            chosen = list(checksums if names is None else names)
            found = threads.map(lambda name: _find_difference(checkpoint / name, **checksums[name]), chosen)
            return next(filter(None, found), None)
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except UNREADABLE:
        return f"{COMPLETE} is not as it was written"
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read: {error.strerror}") from None


def written_files(checkpoint: Path) -> list[str]:
    """Return the files that were written with a checkpoint, by path in it; others beside them are not its own.

    Raises:
        UserError: COMPLETE, which names them, is missing or damaged.
    """
    return list(read_checksums(checkpoint))


def read_checksums(checkpoint: Path) -> dict[str, Checksum]:
    """Return the bytes and SHA-256 of every file that was written with a checkpoint, by path in it.

    Raises:
        UserError: COMPLETE, which has them, is missing or damaged.
    """
    try:
        return _checksums(checkpoint)
    except (OSError, *UNREADABLE):
        raise UserError(
            f"checkpoint {checkpoint} has no readable {COMPLETE}; copy it again, whole, or use an older one"
        ) from None


def _checksums(checkpoint: Path) -> dict[str, Checksum]:
    checksums: dict[str, Checksum] = json.loads((checkpoint / COMPLETE).read_text())
    if CONFIG not in checksums or TRAIN_STATE not in checksums:
        raise LookupError("files of every checkpoint are not named")
    if any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in checksums):
        raise LookupError("files outside of the checkpoint are named")
    return checksums


def _find_difference(path: Path, bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != bytes:
        return f"{path.name} has {path.stat().st_size} bytes, not {bytes}"
    return None if sha256_of(path) == sha256 else f"{path.name} has another checksum"
