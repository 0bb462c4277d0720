"""Sources of documents: files, folders, globs, data that a Python package ships, Hugging Face datasets.

Sources are divided into work units, by their files and `unit_bytes` alone, so the units are the same for any number of
workers.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tostlm.data.preparation.folders import FoundFile, find_files
from tostlm.data.shards import FrozenModel
from tostlm.errors import UserError, error_summary

if TYPE_CHECKING:
    import datasets

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
KINDS = {".jsonl": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
PACKAGE = "package:"
HUB_ID = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?$")
MAX_HUB_UNITS = 1000  # of one dataset
UNIT_BYTES = 1 << 28  # on disk
ENDS_BYTES = 1 << 16  # of a file's head, and of its tail


class WorkUnit(FrozenModel):
    """What one worker reads at a time: whole files, a range of one file's bytes, or a shard of a hub dataset."""

    bytes: int | None  # on disk; None for a hub dataset
    files: tuple[str, ...] = ()
    byte_range: tuple[int, int] | None = None  # of the one file, for the records that begin in it
    hub: str | None = None
    shard: tuple[int, int] = (0, 1)  # of the hub dataset: index and number of shards


class FileState(FrozenModel):
    """What changes when a file is written: its size, its time, and the hash of its head and tail."""

    bytes: int
    mtime_ns: int
    sha256: str  # of the first and last `ENDS_BYTES`

    @classmethod
    def of(cls, path: str) -> FileState:
        """Return the state of a file.

        Raises:
            OSError: it cannot be read.
        """
        with Path(path).open("rb") as file:
            stat = os.fstat(file.fileno())
            ends = file.read(ENDS_BYTES)
            file.seek(max(len(ends), stat.st_size - ENDS_BYTES))
            ends += file.read(ENDS_BYTES)
        return cls(bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=hashlib.sha256(ends).hexdigest())

    def is_same(self, other: FileState) -> bool:
        """Return whether the content is the same, as far as the states tell; a copy of a small file is the same."""
        same_ends = (self.bytes, self.sha256) == (other.bytes, other.sha256)
        return same_ends and (self.mtime_ns == other.mtime_ns or self.bytes <= 2 * ENDS_BYTES)


def list_work_units(sources: Sequence[str], unit_bytes: int = UNIT_BYTES) -> list[WorkUnit]:
    """Divide sources into work units, in order, of about `unit_bytes` bytes on disk each.

    A source is a file (.jsonl, .json, .parquet, .arrow, .txt, compressed or not; a .txt file is one document), a
    folder or a glob of such files, `package:NAME/GLOB` for files a Python package ships, or a Hugging Face dataset
    `OWNER/NAME[:CONFIG][@SPLIT]`.

    Raises:
        UserError: a source is missing, of no known kind, or named twice.
    """
    return list(divide(find_sources(sources), unit_bytes))


def divide(found: Iterable[FoundSource], unit_bytes: int = UNIT_BYTES) -> Iterator[WorkUnit]:
    """Yield the work units of sources, in order; files of several sources may share one."""
    for in_hub, group in itertools.groupby(found, key=lambda source: source.files is None):
        if in_hub:
            for name, _ in group:
                count = min(hub_dataset(name).num_shards, MAX_HUB_UNITS)
                yield from (WorkUnit(bytes=None, hub=name, shard=(index, count)) for index in range(count))
        else:
            yield from _units_of_files([file for _, files in group for file in files or ()], unit_bytes)


def _units_of_files(files: Sequence[FoundFile], unit_bytes: int) -> Iterator[WorkUnit]:
    group: list[str] = []
    size = 0
    for path, file_bytes, _ in files:
        if group and size + file_bytes > unit_bytes:
            yield WorkUnit(bytes=size, files=tuple(group))
            group, size = [], 0
        if file_bytes > unit_bytes and path.lower().endswith(".jsonl"):
            for start in range(0, file_bytes, unit_bytes):
                stop = min(start + unit_bytes, file_bytes)
                yield WorkUnit(bytes=stop - start, files=(path,), byte_range=(start, stop))
        else:
            group.append(path)
            size += file_bytes
    if group:
        yield WorkUnit(bytes=size, files=tuple(group))


class FoundSource(NamedTuple):
    """A source and its data files that are not empty by right, by path; no files for a hub dataset."""

    name: str
    files: list[FoundFile] | None


def find_sources(sources: Sequence[str]) -> list[FoundSource]:
    """Find the files of sources.

    Raises:
        UserError: a source is missing, of no known kind, or names what another one does.
    """
    found = [FoundSource(source, _files(source)) for source in sources]
    first: dict[object, tuple[str, str]] = {}  # what was named, and by which source, of each file and hub dataset
    for source, files in found:
        named = [(file.identity, file.path) for file in files] if files is not None else [(_hub_parts(source), source)]
        for identity, path in named:
            if identity in first:
                raise UserError(f"{_both_names(*first[identity], path, source)}; name it once")
            first[identity] = path, source
    return found


def _both_names(path: str, source: str, other_path: str, other_source: str) -> str:
    also = "" if other_path == path else f" (as {other_path})"
    return f"{path} is in two sources, {source} and {other_source}{also}"


def kind_of(path: str) -> str | None:
    """Return the kind of a data file by its name, compressed or not; None if it is not one."""
    name = Path(path.lower())
    return KINDS.get(name.with_suffix("").suffix if name.suffix in COMPRESSIONS else name.suffix)


def _may_be_empty(path: str) -> bool:
    """Return whether a file of no bytes is a file without records; otherwise it is damaged."""
    return Path(path.lower()).suffix not in (*COMPRESSIONS, ".parquet", ".arrow")


def _files(source: str) -> list[FoundFile] | None:
    """Return the data files that a source names, by path; None if it names none but has the form of a hub id."""
    if not source:
        raise UserError("a source is empty; name a file, folder, glob or dataset")
    pattern = source
    if source.startswith(PACKAGE):
        name, _, inside = source.removeprefix(PACKAGE).partition("/")
        try:
            pattern = str(importlib.resources.files(name).joinpath(inside))
        except (ModuleNotFoundError, ValueError):
            raise UserError(f"source {source}: the package {name} is not installed; `pip install {name}`") from None
    found = find_files(pattern, kind_of)
    types = " ".join(KINDS)
    if not found:
        if not Path(pattern).exists() and HUB_ID.match(source) and "/" in source and not kind_of(source):
            return None
        raise UserError(f"source {source} names no file ({types}, compressed or not); check the path")
    unknown = [file.path for file in found if not kind_of(file.path)]
    if unknown:
        raise UserError(f"source {unknown[0]} is of no known type; use one of {types}, compressed or not")
    written = [file for file in found if file.bytes or not _may_be_empty(file.path)]
    if not written:
        raise no_text(source)
    return written


def no_text(source: str) -> UserError:
    return UserError(f"source {source} holds no text; name a source with at least one document")


@lru_cache  # a hub may take minutes to list a dataset's files, and a worker reads many parts of it
def hub_dataset(source: str) -> datasets.IterableDataset:
    """Open a Hugging Face dataset as a stream; nothing of it is kept on disk.

    Raises:
        UserError: the hub does not have it, or cannot be reached.
    """
    import datasets

    name, config, split = _hub_parts(source)
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds, all of which mean the same to the user
        raise UserError(
            f"source {source} is no file here and the Hugging Face hub did not give it: {error_summary(error)}"
        ) from None


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """Return the name, the configuration and the split of a hub dataset."""
    match = HUB_ID.match(source)
    assert match is not None
    return match["name"], match["config"], match["split"] or "train"
