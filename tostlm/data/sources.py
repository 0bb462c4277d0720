"""Documents from anything `datasets` loads: files, folders, globs, data that a Python package ships, hub ids."""

from __future__ import annotations

import glob
import importlib.resources
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tostlm.errors import UserError, reason_of

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
OPTIONS: dict[str, dict[str, Any]] = {
    "json": {},
    "parquet": {},
    "arrow": {},
    "text": {"sample_by": "document"},
}
PACKAGE = "package:"
HUB_ID = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?$")


def documents(sources: Sequence[str], text_column: str = "text") -> Iterator[str]:
    """The texts of every source, in order; empty ones are left out.

    A source is a file (.jsonl, .json, .parquet, .arrow, .txt, compressed or not; a .txt file is one document), a
    folder or a glob of such files, `package:NAME/GLOB` for files a Python package ships, or a Hugging Face dataset
    `OWNER/NAME[:CONFIG][@SPLIT]`. Nothing is read before the first document is asked for, and files stream.

    Raises:
        UserError: a source is missing or unreadable, or lacks the text column.
    """
    for source in sources:
        empty = True
        for dataset, origin in _datasets(source):
            for text in _texts(dataset, origin, text_column):
                empty = False
                yield text
        if empty:
            raise UserError(f"source {source} holds no text; name a source with at least one document")


def _datasets(source: str) -> Iterator[tuple[Any, str]]:
    files = _files(source)
    if files is None:
        yield _hub_dataset(source), source
        return
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, by us
    present = [path for path in files if Path(path).stat().st_size]
    for builder, paths in itertools.groupby(present, key=_builder):
        assert builder is not None  # _files lets no other through
        group = list(paths)
        origin = group[0] if len(group) == 1 else source
        try:
            stream = datasets.load_dataset(
                builder, data_files=[*map(glob.escape, group)], split="train", streaming=True, **OPTIONS[builder]
            )
        except Exception as error:  # each reader of `datasets` raises its own kind on broken data
            raise UserError(f"source {origin} cannot be read: {reason_of(error)}") from None
        yield stream, origin


def _builder(path: str) -> str | None:
    """The `datasets` builder for a file, compressed or not; None where there is none."""
    path = path.lower()
    for compression in COMPRESSIONS:
        path = path.removesuffix(compression)
    return next((builder for suffix, builder in BUILDERS.items() if path.endswith(suffix)), None)


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
        found = [str(path) for path in Path(pattern).rglob("*") if path.is_file() and _builder(str(path))]
    else:
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        found = [path for path in matches if Path(path).is_file()]
    types = " ".join(BUILDERS)
    if not found:
        if not Path(pattern).exists() and HUB_ID.match(source) and "/" in source and not _builder(source):
            return None
        raise UserError(f"source {source} names no file ({types}, compressed or not); check the path")
    unknown = [path for path in found if not _builder(path)]
    if unknown:
        raise UserError(f"source {unknown[0]} is of no known type; use one of {types}, compressed or not")
    return sorted(found)


def _hub_dataset(source: str) -> Any:
    import datasets

    match = HUB_ID.match(source)
    assert match is not None
    split = match["split"] or "train"
    try:
        return datasets.load_dataset(match["name"], match["config"], split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds, all of which mean the same to the user
        raise UserError(
            f"source {source} is no file here and the Hugging Face hub did not give it: {reason_of(error)}"
        ) from None


def _texts(dataset: Any, origin: str, text_column: str) -> Iterator[str]:
    rows = iter(dataset)
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            reason = reason_of(error.__cause__ or error)
            raise UserError(f"source {origin} cannot be read after {number} documents: {reason}") from None
        if text_column not in row:
            columns = ", ".join(row)
            raise UserError(f"source {origin} has no column {text_column!r}, only {columns}; choose with --text-column")
        text = row[text_column]
        if not isinstance(text, str):
            raise UserError(f"source {origin}, document {number}: {text_column} is {text!r:.40}, not text")
        number += 1
        if text:
            yield text
