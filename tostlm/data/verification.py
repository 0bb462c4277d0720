"""Verification of prepared folders by the checksums of the manifest.

When every shard file is verified, a stamp, `.verified.json`, keeps their sizes and modification times. `verify_once`
reads only files that differ from the stamp, so a training run that starts again reads no shard at all. Damage that
changes neither size nor modification time is found by `verify`, which always reads every byte.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pydantic

from tostlm.data.loading.token_set import TokenSet
from tostlm.data.shards import DROPPED, FrozenModel, Manifest, load_tokenizer, read_manifest
from tostlm.errors import UserError
from tostlm.files import sha256_of, write_atomically

STAMP = ".verified.json"
HASHING_THREADS = 8  # hashing releases Python's lock, so threads use as many cores

FileState: TypeAlias = tuple[int, int]  # size and modification time, which change when a file is written


class Stamp(FrozenModel):
    """The content of the stamp: which manifest was verified, and the state of each shard file then."""

    content_sha256: str
    files: dict[str, FileState]


def verify(folder: Path, files: Collection[str] | None = None) -> Iterator[str]:
    """Compare the files of a prepared folder with the manifest's checksums, reading every byte.

    `files` names the shard files to check, some of `shard_files`; None is all of them, the tokenizer and the report of
    dropped documents. Each name is yielded as soon as the file's checksum is found to agree.

    Raises:
        UserError: a file is missing or its checksum or size is not the manifest's.
    """
    manifest = check_sizes(folder)
    if files is None:
        yield load_tokenizer(folder).file_name
        if manifest.dropped_sha256 is not None:
            report = folder / DROPPED
            if not report.is_file() or sha256_of(report) != manifest.dropped_sha256:
                raise UserError(f"{report} is damaged: its SHA-256 is not the manifest's; prepare the data again")
            yield report.name
    yield from _verify(folder, manifest, shard_files(manifest) if files is None else files, {})


def verify_once(folder: Path) -> int:
    """Verify the files of a prepared folder that changed since they were last verified; return their bytes.

    Without a stamp of the same manifest every file is read. A folder that cannot be written gets no stamp.

    Raises:
        UserError: a file is missing or its checksum or size is not the manifest's.
    """
    manifest = check_sizes(folder)
    load_tokenizer(folder)
    stamped: dict[str, FileState] = {}
    with suppress(OSError, pydantic.ValidationError):  # the stamp is missing or damaged
        stamp = Stamp.model_validate_json((folder / STAMP).read_bytes())
        if stamp.content_sha256 == manifest.content_sha256:
            stamped = stamp.files
    changed = [name for name in shard_files(manifest) if name not in stamped or _state(folder / name) != stamped[name]]
    return sum((folder / name).stat().st_size for name in _verify(folder, manifest, changed, stamped))


class ShardStates:
    """The sizes and times of the shard files of prepared folders at its construction, to notice what changes later."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._states = {folder: _states(folder) for folder in folders}

    def verify_changed(self) -> None:
        """Verify the files that changed since the last call, or the construction.

        Raises:
            UserError: one is missing or its checksum is not the manifest's.
        """
        for folder, before in self._states.items():
            now = _states(folder)
            changed = [name for name, state in now.items() if state is None or before.get(name) != state]
            for _ in verify(folder, changed) if changed else ():
                pass
            self._states[folder] = now


def _states(folder: Path) -> dict[str, FileState | None]:
    return {name: _state(folder / name) for name in shard_files(read_manifest(folder))}


def shard_files(manifest: Manifest) -> dict[str, str]:
    """Return the name of every shard file of a prepared folder with its SHA-256."""
    return {
        f"{shard.name}.{suffix}": sha256
        for split in manifest.splits.values()
        for shard in split.shards
        for suffix, sha256 in shard.sha256.items()
    }


def check_sizes(folder: Path) -> Manifest:
    """Return the manifest of a prepared folder whose shards have the sizes it says; raise UserError otherwise."""
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenSet(folder, name)
    return manifest


def _verify(
    folder: Path, manifest: Manifest, files: Collection[str], stamped: Mapping[str, FileState]
) -> Iterator[str]:
    """Yield the name of each file that is good; write the stamp if the state of every file is known then."""
    expected = shard_files(manifest)
    states = dict(stamped)

    def check(name: str) -> FileState:
        path = folder / name
        state = _state(path)  # before the file is read, so that a later change shows
        if state is None or sha256_of(path) != expected[name]:
            raise UserError(f"shard {path} is damaged: its SHA-256 is not the manifest's; prepare the data again")
        return state

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, state in zip(files, pool.map(check, files), strict=True):
            states[name] = state
            yield name
    if files and states.keys() == expected.keys():
        stamp = Stamp(content_sha256=manifest.content_sha256, files=states)
        with suppress(OSError):  # a folder that cannot be written is verified each time
            write_atomically(folder / STAMP, stamp.model_dump_json())


def _state(path: Path) -> FileState | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
