"""Merging finished work units into a prepared folder: duplicates are dropped, shards numbered, the manifest written.

The units are not changed before the manifest is there, so an interrupted merge is done again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tostlm.data.preparation.dedup import Duplicates, ShardRef, find_duplicates
from tostlm.data.preparation.plan import PLAN, UNITS, PreparationSettings, read_plan, read_results, unit_folder
from tostlm.data.preparation.selection import nothing_left
from tostlm.data.shards import (
    DROPPED,
    HASH_BYTES,
    MANIFEST,
    SUFFIXES,
    TEXT_BYTES_SUFFIX,
    TRAIN,
    VALIDATION,
    Documents,
    Manifest,
    Shard,
    ShardWriter,
    dtype_for,
    read_manifest,
    shard_name,
    write_manifest,
)
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import locked, sha256_of

LOCK = ".merge.lock"
SCRATCH = ".dedup"
TOKENS_AT_ONCE = 1 << 22  # copied, unless a document has more


def merge(out: Path) -> Manifest:
    """Make a prepared folder of the finished work units in `out`; of one that is made, clear what a kill left.

    Raises:
        UserError: a work unit is not finished, damaged or of another tokenizer, or no document is left.
    """
    if (out / MANIFEST).exists():
        _clear(out)
        return read_manifest(out)
    plan = read_plan(out)
    settings = plan.settings
    with locked(out / LOCK, f"another tostlm prepare --merge is running in {out}; wait for it or end it"):
        results = read_results(out, plan)
        dropped = sum((Counter(result.dropped) for result in results), Counter[str]())
        shards = {
            split: [
                (unit_folder(out, index), shard) for index, each in enumerate(results) for shard in each.shards[split]
            ]
            for split in (TRAIN, VALIDATION)
        }
        tokenizer, all_shards = Tokenizer.from_folder(out), list(itertools.chain(*shards.values()))
        token_bytes = np.dtype(dtype_for(tokenizer.vocab_size)).itemsize
        for folder, shard in all_shards:
            _require_files(folder, shard, token_bytes)
        duplicates = _find_duplicates(settings, all_shards, out / SCRATCH)
        if duplicates.count:
            dropped["duplicate"] = duplicates.count
        merged, first = {}, 0
        for split, of_split in shards.items():
            merged[split] = _publish(out, split, of_split, duplicates, first)
            first += sum(shard.documents for _, shard in of_split)
        if not any(merged.values()):
            raise nothing_left(settings.sources, dropped)
        lines = [json.dumps(example) + "\n" for result in results for example in result.examples]
        (out / DROPPED).write_text("".join(lines))
        manifest = write_manifest(
            out,
            tokenizer,
            merged,
            sources=settings.sources,
            heldout_fraction=settings.heldout_fraction,
            command=plan.command,
            settings=settings.model_dump(mode="json", exclude={"sources", "heldout_fraction"}),
            dropped=dropped,
        )
    _clear(out)
    return manifest


def _require_files(folder: Path, shard: Shard, token_bytes: int) -> None:
    """Check that a shard's files have the sizes that follow from its counts; raise UserError otherwise."""
    counts = (shard.tokens, *[shard.documents] * 3)
    for suffix, count, width in zip(
        (*SUFFIXES, TEXT_BYTES_SUFFIX), counts, (token_bytes, 8, HASH_BYTES, 4), strict=True
    ):
        path = folder / f"{shard.name}.{suffix}"
        size = path.stat().st_size if path.exists() else 0
        if size != count * width:
            raise UserError(f"{path} has {size} bytes, not {count * width}; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"remove {folder} and run the same `tostlm prepare` again: it makes this work unit anew"


def _clear(out: Path) -> None:
    """Remove what a prepared folder was made of."""
    for folder in (UNITS, SCRATCH):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in (out / PLAN, *out.glob(".*.lock"), *out.glob(".*.partial-*")):
        file.unlink(missing_ok=True)


def _find_duplicates(settings: PreparationSettings, shards: Sequence[ShardRef], scratch: Path) -> Duplicates:
    if not (settings.dedup or settings.dedup_against):
        return Duplicates(sum(shard.documents for _, shard in shards))
    # All splits of the earlier folders: they may have held out another share.
    splits = [(folder, split) for folder in settings.dedup_against for split in read_manifest(folder).splits.values()]
    earlier = [(folder, shard) for folder, split in splits for shard in split.shards]
    return find_duplicates(earlier, shards, settings.dedup, scratch)


def _publish(out: Path, split: str, shards: Sequence[ShardRef], duplicates: Duplicates, first: int) -> list[Shard]:
    """Put shards into the folder as SPLIT-00000 and so on, without duplicates; `first` numbers their first document."""
    for leftover in out.glob(f"{split}-*"):
        leftover.unlink()
    published: list[Shard] = []
    for folder, shard in shards:
        kept = duplicates.kept(first, shard.documents)
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
    for suffix in SUFFIXES:  # what is copied gets checksums of its own, which damage would pass
        if sha256_of(path := folder / f"{shard.name}.{suffix}") != shard.sha256[suffix]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the recorded one; {_remedy(folder)}")
    width = (folder / f"{shard.name}.bin").stat().st_size // shard.tokens
    tokens, ends, hashes, text_bytes = (
        np.asarray(np.memmap(folder / f"{shard.name}.{suffix}", dtype, mode="r"))
        for suffix, dtype in (("bin", f"<u{width}"), ("ends", "<i8"), ("hashes", "u1"), (TEXT_BYTES_SUFFIX, "<u4"))
    )
    if text_bytes.sum(dtype=np.int64) != shard.text_bytes:
        path = folder / f"{shard.name}.{TEXT_BYTES_SUFFIX}"
        raise UserError(f"{path} is damaged: it does not add up to {shard.text_bytes}; {_remedy(folder)}")
    hashes = hashes.reshape(-1, HASH_BYTES)
    writer = ShardWriter(out, name)
    start = 0
    while start < shard.documents:
        begin = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, begin + TOKENS_AT_ONCE)))
        lengths = np.diff(ends[start:stop], prepend=begin)
        documents = Documents(tokens[begin : ends[stop - 1]], lengths, hashes[start:stop], text_bytes[start:stop])
        writer.add(documents.chosen(kept[start:stop]))
        start = stop
    (out / f"{name}.{TEXT_BYTES_SUFFIX}").unlink()
    return writer.finish()
