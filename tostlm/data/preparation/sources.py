"""Where documents come from: files, folders, globs, data that a Python package ships, Hugging Face datasets.

A source is split into parts, the pieces of work that preparation shares out. The split is a function of the files and
`part_bytes` alone, so it is the same for any number of workers.
"""

from __future__ import annotations

import glob
import importlib.resources
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydantic

from tostlm.errors import UserError, error_summary

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
KINDS = {".jsonl": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
PACKAGE = "package:"
HUB_ID = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?$")
HUB_PARTS = 1000  # at most, of a dataset
PART_BYTES = 1 << 28  # on disk


class WorkUnit(pydantic.BaseModel):
    """A piece of the sources: some files whole, a range of one file's bytes, or a shard of a hub dataset."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    bytes: int | None  # on disk; None where a hub does not say
    files: tuple[str, ...] = ()
    byte_range: tuple[int, int] | None = None  # of the one file: records that begin in it
    hub: str | None = None
    shard: tuple[int, int] = (0, 1)  # of the hub dataset: index and number


def parts_of(sources: Sequence[str], part_bytes: int = PART_BYTES) -> list[WorkUnit]:
    """The parts of every source, in order, of about `part_bytes` bytes on disk each.

    A source is a file (.jsonl, .json, .parquet, .arrow, .txt, compressed or not; a .txt file is one document), a
    folder or a glob of such files, `package:NAME/GLOB` for files a Python package ships, or a Hugging Face dataset
    `OWNER/NAME[:CONFIG][@SPLIT]`.

    Raises:
        UserError: a source is missing, or of no known kind.
    """
    named = [(source, _files(source)) for source in sources]
    parts: list[WorkUnit] = []
    for in_hub, group in itertools.groupby(named, key=lambda pair: pair[1] is None):
        if in_hub:
            parts += [part for source, _ in group for part in _hub_parts(source)]
        else:
            parts += _file_parts([file for _, files in group for file in files or ()], part_bytes)
    return parts


def _file_parts(files: Sequence[str], part_bytes: int) -> Iterator[WorkUnit]:
    group: list[str] = []
    size = 0
    for file in files:
        file_bytes = Path(file).stat().st_size
        if group and size + file_bytes > part_bytes:
            yield WorkUnit(bytes=size, files=tuple(group))
            group, size = [], 0
        if file_bytes > part_bytes and file.lower().endswith(".jsonl"):
            for start in range(0, file_bytes, part_bytes):
                stop = min(start + part_bytes, file_bytes)
                yield WorkUnit(bytes=stop - start, files=(file,), byte_range=(start, stop))
        else:
            group.append(file)
            size += file_bytes
    if group:
        yield WorkUnit(bytes=size, files=tuple(group))


def _hub_parts(source: str) -> Iterator[WorkUnit]:
    shards = min(hub_dataset(source).num_shards, HUB_PARTS)
    for index in range(shards):
        yield WorkUnit(bytes=None, hub=source, shard=(index, shards))


def kind_of(path: str) -> str | None:
    """What a file is read as, by its name, compressed or not; None where it is no data."""
    path = path.lower()
    for compression in COMPRESSIONS:
        path = path.removesuffix(compression)
    return next((kind for suffix, kind in KINDS.items() if path.endswith(suffix)), None)


def _files(source: str) -> list[str] | None:
    """The data files a source names, sorted; None where it names none here but looks like a hub id."""
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
def hub_dataset(source: str) -> Any:
    """A Hugging Face dataset as a stream; nothing of it is kept on disk.

    Raises:
        UserError: the hub does not give it.
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
