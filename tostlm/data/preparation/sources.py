"""Sources of documents: files, folders, globs, data that a Python package ships, Hugging Face datasets.

Sources are divided into work units, by their files and `unit_bytes` alone, so the units are the same for any number of
workers.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

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
        UserError: a source is missing, or of no known kind.
    """
    files_of_sources = [(source, _files(source)) for source in sources]
    units: list[WorkUnit] = []
    for in_hub, group in itertools.groupby(files_of_sources, key=lambda pair: pair[1] is None):
        if in_hub:
            for source, _ in group:
                count = min(hub_dataset(source).num_shards, MAX_HUB_UNITS)
                units += [WorkUnit(bytes=None, hub=source, shard=(index, count)) for index in range(count)]
        else:
            units += _units_of_files([file for _, files in group for file in files or ()], unit_bytes)
    return units


def _units_of_files(files: Sequence[str], unit_bytes: int) -> Iterator[WorkUnit]:
    group: list[str] = []
    size = 0
    for file in files:
        file_bytes = Path(file).stat().st_size
        if group and size + file_bytes > unit_bytes:
            yield WorkUnit(bytes=size, files=tuple(group))
            group, size = [], 0
        if file_bytes > unit_bytes and file.lower().endswith(".jsonl"):
            for start in range(0, file_bytes, unit_bytes):
                stop = min(start + unit_bytes, file_bytes)
                yield WorkUnit(bytes=stop - start, files=(file,), byte_range=(start, stop))
        else:
            group.append(file)
            size += file_bytes
    if group:
        yield WorkUnit(bytes=size, files=tuple(group))


def kind_of(path: str) -> str | None:
    """Return the kind of a data file by its name, compressed or not; None if it is not one."""
    name = Path(path.lower())
    return KINDS.get(name.with_suffix("").suffix if name.suffix in COMPRESSIONS else name.suffix)


def _files(source: str) -> list[str] | None:
    """Return the data files that a source names, sorted; None if it names none but has the form of a hub id."""
    if not source:
        raise UserError("a source is empty; name a file, folder, glob or dataset")
    pattern = source
    if source.startswith(PACKAGE):
        name, _, inside = source.removeprefix(PACKAGE).partition("/")
        try:
            pattern = str(importlib.resources.files(name).joinpath(inside))
        except (ModuleNotFoundError, ValueError):
            raise UserError(f"source {source}: the package {name} is not installed; `pip install {name}`") from None
    if Path(pattern).is_dir():
        found = [str(path) for path in Path(pattern).rglob("*") if path.is_file() and kind_of(str(path))]
    else:
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        found = [path for path in matches if Path(path).is_file()]
    types = " ".join(KINDS)
    if not found:
        if not Path(pattern).exists() and HUB_ID.match(source) and "/" in source and not kind_of(source):
            return None
        raise UserError(f"source {source} names no file ({types}, compressed or not); check the path")
    unknown = [path for path in found if not kind_of(path)]
    if unknown:
        raise UserError(f"source {unknown[0]} is of no known type; use one of {types}, compressed or not")
    written = sorted(path for path in found if Path(path).stat().st_size)
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

    match = HUB_ID.match(source)
    assert match is not None
    split = match["split"] or "train"
    try:
        return datasets.load_dataset(match["name"], match["config"], split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds, all of which mean the same to the user
        raise UserError(
            f"source {source} is no file here and the Hugging Face hub did not give it: {error_summary(error)}"
        ) from None
