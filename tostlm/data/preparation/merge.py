"""Merging finished work units into a prepared folder: duplicates are dropped, shards numbered, the manifest written.

The units are not changed before the manifest is there, so an interrupted merge is done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tostlm.data.preparation.plan import PLAN, UNITS, read_plan, read_results, unit_folder
from tostlm.data.shards import (
    DROPPED,
    HASH_BYTES,
    SUFFIXES,
    TEXT_BYTES_SUFFIX,
    TRAIN,
    VALIDATION,
    Manifest,
    Shard,
    finish_shard,
    read_manifest,
    shard_name,
    write_manifest,
)
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import locked

LOCK = ".merge.lock"
HASHES_AT_ONCE = 4_000_000  # compared in memory, some 64 bytes each

ShardRef: TypeAlias = tuple[Path, Shard]  # a shard and the folder that holds its files


def merge(out: Path) -> Manifest:
    """Make a prepared folder of the finished work units in `out`.

    Raises:
        UserError: a work unit is not finished or of another tokenizer, or no document is left.
    """
    plan = read_plan(out)
    settings = plan.settings
    with locked(out / LOCK, f"another tostlm prepare --merge is running in {out}; wait for it or end it"):
        results = read_results(out, plan)
        dropped = sum((Counter(result.dropped) for result in results), Counter[str]())
        # All splits of the earlier folders: they may have held out another share.
        splits = [
            (folder, split) for folder in settings.dedup_against for split in read_manifest(folder).splits.values()
        ]
        earlier = [(folder, shard) for folder, split in splits for shard in split.shards]
        merged = {}
        for split in (TRAIN, VALIDATION):
            shards = [
                (unit_folder(out, index), shard)
                for index, result in enumerate(results)
                for shard in result.shards[split]
            ]
            keep = np.ones(sum(shard.documents for _, shard in shards), bool)
            if settings.dedup or settings.dedup_against:
                keep = find_first_copies(earlier, shards, within=settings.dedup)
                dropped["duplicate"] += int((~keep).sum())
            merged[split] = _publish(out, split, shards, keep)
        if not any(merged.values()):
            raise UserError(f"no document of {', '.join(settings.sources)} is left; dropped: {format_counts(dropped)}")
        lines = [json.dumps(example) + "\n" for result in results for example in result.examples]
        (out / DROPPED).write_text("".join(lines))
        manifest = write_manifest(
            out,
            Tokenizer.from_folder(out),
            merged,
            sources=settings.sources,
            heldout_fraction=settings.heldout_fraction,
            command=plan.command,
            settings=settings.model_dump(mode="json", exclude={"sources", "heldout_fraction"}),
            dropped=dropped,
        )
    shutil.rmtree(out / UNITS, ignore_errors=True)
    for name in (PLAN, LOCK):
        (out / name).unlink(missing_ok=True)
    return manifest


def format_counts(dropped: Mapping[str, int]) -> str:
    """Return counts of dropped documents, by reason, as one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count) or "none"


def find_first_copies(earlier: Sequence[ShardRef], shards: Sequence[ShardRef], within: bool) -> np.ndarray:
    """Return which documents of `shards` have a text that no document of `earlier` has, bool [documents].

    With `within`, no document before it in `shards` may have it either. Hashes are compared a part of their values at a
    time, so memory holds some `HASHES_AT_ONCE` of them.
    """
    known = sum(shard.documents for _, shard in earlier)
    keep = np.ones(known + sum(shard.documents for _, shard in shards), bool)
    parts = -(-len(keep) // HASHES_AT_ONCE)
    for part in range(parts):
        hashes, numbers = _hashes_of_part([*earlier, *shards], part, parts)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        first_copy = numbers[first][inverse]
        keep[numbers[first_copy < (numbers if within else known)]] = False
    return keep[known:]


def _hashes_of_part(shards: Sequence[ShardRef], part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes whose remainder by `parts` is `part`, and the numbers of their documents."""
    hashes, numbers = [], []
    first = 0
    for folder, shard in shards:
        stored = np.fromfile(folder / f"{shard.name}.hashes", f"S{HASH_BYTES}")
        second_halves = stored.view("<u8")[1::2]  # the first decide which documents are held out
        chosen = np.flatnonzero(second_halves % parts == part)
        hashes.append(stored[chosen])
        numbers.append(chosen + first)
        first += shard.documents
    return np.concatenate(hashes), np.concatenate(numbers)


def _publish(out: Path, split: str, shards: Sequence[ShardRef], keep: np.ndarray) -> list[Shard]:
    """Put shards into the folder as SPLIT-00000 and so on, without the documents that are not kept."""
    for leftover in out.glob(f"{split}-*"):
        leftover.unlink()
    published: list[Shard] = []
    first = 0
    for folder, shard in shards:
        kept = keep[first : first + shard.documents]
        first += shard.documents
        name = shard_name(split, len(published))
        if kept.all():
            for suffix in SUFFIXES:
                _link(folder / f"{shard.name}.{suffix}", out / f"{name}.{suffix}")
            published.append(shard.model_copy(update={"name": name}))
        elif kept.any():
            published.append(_copy_kept(folder, shard, kept, out, name))
    return published


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _copy_kept(folder: Path, shard: Shard, kept: np.ndarray, out: Path, name: str) -> Shard:
    ends = np.fromfile(folder / f"{shard.name}.ends", "<u8").astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    hashes = np.fromfile(folder / f"{shard.name}.hashes", f"V{HASH_BYTES}")
    text_bytes = np.fromfile(folder / f"{shard.name}.{TEXT_BYTES_SUFFIX}", "<u4")
    width = (folder / f"{shard.name}.bin").stat().st_size // shard.tokens
    content = np.memmap(folder / f"{shard.name}.bin", np.dtype(f"V{width}"), mode="r")
    with (out / f"{name}.bin").open("wb") as file:
        for end, length in zip(ends[kept].tolist(), lengths[kept].tolist(), strict=True):
            file.write(content[end - length : end].tobytes())
    return finish_shard(out, name, lengths[kept], hashes[kept].tobytes(), text_bytes[kept])
