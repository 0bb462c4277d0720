"""The files that a path names: itself, those of a folder, or those of a glob.

One walk serves folders and globs. It follows links, enters a folder once under each part of a pattern whatever links
lead to it, and leaves out names that begin with a dot, which programs give to what is no data (.git, .cache,
.ipynb_checkpoints), unless the pattern spells the dot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tostlm.errors import UserError, error_summary

ANY_DEPTH = "**"
# Of what `datasets` saves: the two files beside the shards of a dataset, and the one beside the folders of its splits.
SAVED_STATE, SAVED_INFO, SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"

Identity: TypeAlias = tuple[int, int]  # device and inode: the same for all names of a file or folder


class FoundFile(NamedTuple):
    """A file as it was found."""

    path: str
    bytes: int
    identity: Identity


def find_files(pattern: str, is_data: Callable[[str], object]) -> list[FoundFile]:
    """Return the files that a path names, by path: itself, those in a folder that are data, or all that match a glob.

    A file that has several names there is returned once. Of a folder that `datasets` saved, the files are its shards.

    Raises:
        UserError: a name is no UTF-8, a link leads nowhere, or a folder that `datasets` saved is damaged or holds
            several splits.
        OSError: a folder cannot be read.
    """
    path = Path(pattern)
    paths: Iterable[Path]
    if path.is_dir():
        paths = (file for file in _walk(path, (ANY_DEPTH, "*"), set()) if is_data(file.name))
    elif path.exists():
        paths = [path]
    else:
        parts = (*path.parts, "*") if path.name == ANY_DEPTH else path.parts
        paths = _walk(Path(), parts, set())
    found: dict[Identity, FoundFile] = {}
    for path in paths:
        if (name := str(path)) != (shown := name.encode(errors="backslashreplace").decode()):
            raise UserError(f"{shown} has a name that is no UTF-8, which no report can hold; rename it")
        status = path.stat()
        found.setdefault(_identity(status), FoundFile(str(path), status.st_size, _identity(status)))
    return sorted(found.values())


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _walk(folder: Path, parts: Sequence[str], entered: set[tuple[Identity, int]]) -> Iterator[Path]:
    """Yield the files below a folder whose paths match the parts of a pattern.

    `entered` holds each folder that was entered with the number of parts that were left.
    """
    step = _identity(folder.stat()), len(parts)
    if step in entered:
        return
    entered.add(step)
    part, *rest = parts
    if part == ANY_DEPTH:
        yield from _walk(folder, rest, entered)
        rest = [part, *rest]
    for path in _matches(folder, part):
        if rest and path.is_dir():
            yield from _walk(path, rest, entered)
        elif not rest and path.is_file():
            yield path


def _matches(folder: Path, part: str) -> list[Path]:
    """Return the paths in a folder that match one part of a pattern; links come last."""
    if not has_magic(part):
        return [folder / part]
    with os.scandir(folder) as entries:
        present = {entry.name: entry.is_symlink() for entry in entries}
    saved = _saved_names(folder, present.keys())
    names = sorted(present, key=lambda name: (present[name], name)) if saved is None else saved
    hidden = part.startswith(".")
    names = [name for name in names if fnmatchcase(name, part) and (hidden or not name.startswith("."))]
    for name in names:
        if present[name] and not (folder / name).exists():
            raise UserError(f"{folder / name} is a link to what does not exist; correct the link, or remove it")
    return [folder / name for name in names]


def _saved_names(folder: Path, present: Set[str]) -> list[str] | None:
    """Return the shards, or the split's folder, of a dataset that `datasets` saved; None for another folder."""
    if SAVED_SPLITS in present:
        kept = SAVED_SPLITS
    elif {SAVED_STATE, SAVED_INFO} <= present:
        kept = SAVED_STATE
    else:
        return None
    remedy = "copy the folder again, or save the dataset again"
    try:
        content = json.loads((folder / kept).read_bytes())
        names = content["splits"] if kept == SAVED_SPLITS else [shard["filename"] for shard in content["_data_files"]]
        missing = sorted(set(names) - present)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / kept} is damaged: {error_summary(error)}; {remedy}") from None
    if missing:
        raise UserError(f"{folder / missing[0]}, which {kept} names, is missing; {remedy}")
    if kept == SAVED_SPLITS and len(names) > 1:
        raise UserError(
            f"{folder} holds the splits {', '.join(names)}; name the folder of each to read, as {folder / names[0]}"
        )
    return list(names)
