"""Checksums of prepared folders: compare every byte with the manifest, and remember what was found to be good.

A full verification writes a stamp, `.verified.json`, beside the manifest: the identity of the manifest's content and
the size and modification time of every shard file. `verify_once` hashes only files that differ from their stamp, so a
training run that starts again reads no shard at all. Damage that changes neither size nor modification time is left to
`verify`, which always reads every byte.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pydantic

from tostlm.data.loading.token_set import TokenSet
from tostlm.data.shards import FrozenModel, Manifest, load_tokenizer, read_manifest
from tostlm.errors import UserError
from tostlm.files import sha256_of, write_atomically

STAMP = ".verified.json"
HASHING_THREADS = 8  # hashing releases Python's lock, so threads use as many cores


class FileState(NamedTuple):
    """Size and modification time of a file, which change when it is written."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


class Stamp(FrozenModel):
    """The content of `STAMP`: which manifest was verified, and the state of each shard file then."""

    content_sha256: str
    files: dict[str, FileState]


def verify(folder: Path, files: Collection[str] | None = None) -> Iterator[str]:
    """Compare the files of a prepared folder with the manifest's checksums, reading every byte.

    Without `files`, everything is checked and the folder's stamp is written once all of it is found good.

    Args:
        folder: a prepared folder.
        files: names of the shard files to check, some of `shard_files`; None for all of them and the tokenizer.

    Yields:
        The name of each file as soon as its checksum is found to agree.

    Raises:
        UserError: a file is missing or its checksum or size is not the manifest's.
    """
    manifest = read_manifest(folder)
    if files is None:
        yield load_tokenizer(folder).file_name
    _check_sizes(folder, manifest)
    expected = {name: sha256 for name, sha256 in shard_files(manifest).items() if files is None or name in files}
    states = {}
    for name, state in _hash_files(folder, expected):
        states[name] = state
        yield name
    if files is None:
        _write_stamp(folder, manifest, states)


def verify_once(folder: Path) -> int:
    """Verify the files of a prepared folder that changed since they were last verified, and stamp the folder.

    Without a stamp, or with one that was written for another manifest, every file is read. A folder that cannot be
    written gets no stamp and is read in full each time.

    Args:
        folder: a prepared folder.

    Returns:
        Bytes of shards that were read.

    Raises:
        UserError: a file is missing or its checksum or size is not the manifest's.
    """
    manifest = read_manifest(folder)
    load_tokenizer(folder)
    _check_sizes(folder, manifest)
    stamped = _read_stamp(folder, manifest)
    changed = {
        name: sha256
        for name, sha256 in shard_files(manifest).items()
        if name not in stamped or not (folder / name).is_file() or stamped[name] != FileState.of(folder / name)
    }
    found = dict(_hash_files(folder, changed))
    if found:
        _write_stamp(folder, manifest, {**stamped, **found})
    return sum(state.size for state in found.values())


def shard_files(manifest: Manifest) -> dict[str, str]:
    """Return the name of every shard file of a prepared folder with its SHA-256."""
    return {
        f"{shard.name}.{suffix}": sha256
        for split in manifest.splits.values()
        for shard in split.shards
        for suffix, sha256 in shard.sha256.items()
    }


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenSet(folder, name)


def _hash_files(folder: Path, expected: Mapping[str, str]) -> Iterator[tuple[str, FileState]]:
    """Yield each file with its state before it was hashed; a later change then shows against the stamp."""

    def check(name: str) -> FileState:
        path = folder / name
        state = FileState.of(path) if path.is_file() else None
        if state is None or sha256_of(path) != expected[name]:
            raise UserError(f"shard {path} is damaged: its SHA-256 is not the manifest's; prepare the data again")
        return state

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        yield from zip(expected, pool.map(check, expected), strict=True)


def _read_stamp(folder: Path, manifest: Manifest) -> dict[str, FileState]:
    """Return the state of each file at its last verification; nothing if the stamp is missing, damaged or outdated."""
    try:
        stamp = Stamp.model_validate_json((folder / STAMP).read_bytes())
    except (OSError, pydantic.ValidationError):
        return {}
    return stamp.files if stamp.content_sha256 == manifest.content_sha256 else {}


def _write_stamp(folder: Path, manifest: Manifest, states: Mapping[str, FileState]) -> None:
    stamp = Stamp(content_sha256=manifest.content_sha256, files=dict(states))
    with suppress(OSError):  # a folder that cannot be written is verified each time
        write_atomically(folder / STAMP, stamp.model_dump_json())
