"""The parts of a preparation become one folder: equal documents are dropped, shards numbered, the manifest written.

Nothing of the parts is changed before the manifest stands, so an interrupted merge is simply done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tostlm.data.preparation.plan import PARTS, PLAN, FinishedPart, finished_parts, part_folder, read_plan
from tostlm.data.shards import (
    HASH_BYTES,
    SUFFIXES,
    TRAIN,
    VALIDATION,
    Manifest,
    Shard,
    Split,
    describe_shard,
    read_manifest,
    shard_name,
    write_manifest,
)
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import locked

DROPPED = "dropped.jsonl"
DUPLICATE = "duplicate"
HASHES_AT_ONCE = 4_000_000  # compared in memory, some 64 bytes each


class ShardRef(NamedTuple):
    """A shard of a part."""

    folder: Path
    shard: Shard


def merge(out: Path) -> Manifest:
    """Make a prepared folder of the finished parts in `out`; it is one from the moment the manifest is there.

    Raises:
        UserError: a part is missing or of another tokenizer, or no document is left.
    """
    plan = read_plan(out)
    with locked(out / ".merge.lock", f"another tostlm prepare --merge is at {out}; wait for it or end it"):
        parts = finished_parts(out, plan)
        dropped = _count_dropped(parts)
        splits = {}
        for split in (TRAIN, VALIDATION):
            pieces = [
                ShardRef(part_folder(out, index), shard)
                for index, part in enumerate(parts)
                for shard in part.shards[split]
            ]
            keep = None
            if plan.settings.dedup or plan.settings.dedup_against:
                earlier = [p for folder in plan.settings.dedup_against for p in prepared_pieces(folder)]
                keep = first_of_equals(earlier, pieces, within=plan.settings.dedup)
                dropped[DUPLICATE] = dropped.get(DUPLICATE, 0) + int((~keep).sum())
            splits[split] = Split.of(list(_publish(out, split, pieces, keep)))
        if not any(split.documents for split in splits.values()):
            raise UserError(
                f"no document of {', '.join(plan.settings.sources)} is left; dropped: {format_counts(dropped)}"
            )
        manifest = Manifest.of(
            Tokenizer.from_folder(out),
            sources=plan.settings.sources,
            heldout_fraction=plan.settings.heldout_fraction,
            command=plan.command,
            settings=json.loads(plan.settings.model_dump_json(exclude={"sources", "heldout_fraction"})),
            dropped=dropped,
            splits=splits,
        )
        _write_examples(out, parts)
        write_manifest(out, manifest)
    clear_work(out)
    return manifest


def clear_work(out: Path) -> None:
    """Remove what a finished folder no longer needs."""
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for name in (PLAN, ".merge.lock"):
        (out / name).unlink(missing_ok=True)


def format_counts(dropped: dict[str, int]) -> str:
    """Counts of dropped documents in a line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count) or "none"


def _count_dropped(parts: Sequence[FinishedPart]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in parts:
        for reason, count in part.dropped.items():
            counts[reason] = counts.get(reason, 0) + count
    return counts


def _write_examples(out: Path, parts: Sequence[FinishedPart]) -> None:
    keys = ("reason", "document", "detail")
    lines = [json.dumps(dict(zip(keys, example, strict=True))) for part in parts for example in part.examples]
    (out / DROPPED).write_text("".join(f"{line}\n" for line in lines))


def prepared_pieces(folder: Path) -> list[ShardRef]:
    """The shards of a prepared folder, of every split: it may have held out another share."""
    return [ShardRef(folder, shard) for split in read_manifest(folder).splits.values() for shard in split.shards]


def first_of_equals(earlier: Sequence[ShardRef], pieces: Sequence[ShardRef], within: bool) -> np.ndarray:
    """Which documents of the pieces have a text that stands nowhere before, bool [documents].

    "Before" are the earlier pieces and, if `within`, the documents in front. Hashes are compared a range of values at a
    time, so that memory holds HASHES_AT_ONCE of them however many there are.
    """
    documents = sum(piece.shard.documents for piece in pieces)
    keep = np.ones(documents, bool)
    known = sum(piece.shard.documents for piece in earlier)
    ranges = max(1, -(-(documents + known) // HASHES_AT_ONCE))
    for index in range(ranges):
        hashes, numbers = _hashes_in_range([*earlier, *pieces], index, ranges)
        order = np.argsort(hashes, kind="stable")  # equal hashes stay in the order of the documents
        hashes, numbers = hashes[order], numbers[order] - known
        begins = np.ones(len(hashes), bool)
        begins[1:] = hashes[1:] != hashes[:-1]
        if within:
            again = ~begins
        else:
            first = np.maximum.accumulate(np.where(begins, np.arange(len(hashes)), 0))
            again = numbers[first] < 0
        again &= numbers >= 0
        keep[numbers[again]] = False
    return keep


def _hashes_in_range(pieces: Sequence[ShardRef], index: int, ranges: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes whose first bytes fall in a range of values, and the numbers of their documents."""
    hashes, numbers = [np.empty(0, f"S{HASH_BYTES}")], [np.empty(0, np.int64)]
    first = 0
    for folder, shard in pieces:
        stored = np.fromfile(folder / f"{shard.name}.hashes", f"S{HASH_BYTES}")
        leading = np.frombuffer(stored.tobytes(), ">u4").reshape(len(stored), -1)[:, 0].astype(np.uint64)
        chosen = np.flatnonzero(leading * np.uint64(ranges) >> np.uint64(32) == index)
        hashes.append(stored[chosen])
        numbers.append(chosen + first)
        first += shard.documents
    return np.concatenate(hashes), np.concatenate(numbers)


def _publish(out: Path, split: str, pieces: Sequence[ShardRef], keep: np.ndarray | None) -> Iterator[Shard]:
    """Put the pieces' shards into the folder as SPLIT-00000 and so on, without the documents that are not kept."""
    for leftover in out.glob(f"{split}-*"):
        leftover.unlink()
    number = first = 0
    for folder, shard in pieces:
        kept = None if keep is None else keep[first : first + shard.documents]
        first += shard.documents
        name = shard_name(split, number)
        if kept is None or kept.all():
            for suffix in SUFFIXES:
                _link(folder / f"{shard.name}.{suffix}", out / f"{name}.{suffix}")
            yield shard.model_copy(update={"name": name})
        elif kept.any():
            yield _copy_kept(folder, shard, kept, out, name)
        else:
            continue
        number += 1


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _copy_kept(folder: Path, shard: Shard, kept: np.ndarray, out: Path, name: str) -> Shard:
    ends = np.fromfile(folder / f"{shard.name}.ends", "<u8").astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    width = (folder / f"{shard.name}.bin").stat().st_size // shard.tokens
    content = np.memmap(folder / f"{shard.name}.bin", np.dtype(f"V{width}"), mode="r")
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2)  # runs of kept documents
    with (out / f"{name}.bin").open("wb") as file:
        for begin, end in edges.tolist():
            file.write(content[ends[begin] - lengths[begin] : ends[end - 1]].tobytes())
    (out / f"{name}.ends").write_bytes(np.cumsum(lengths[kept]).astype("<u8").tobytes())
    hashes = np.fromfile(folder / f"{shard.name}.hashes", f"V{HASH_BYTES}")
    (out / f"{name}.hashes").write_bytes(hashes[kept].tobytes())
    text_bytes = np.fromfile(folder / f"{shard.name}.lengths", "<u4")[kept]
    return describe_shard(out, name, int(lengths[kept].sum()), text_bytes.tolist())
