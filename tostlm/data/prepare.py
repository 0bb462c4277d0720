"""Text to token shards."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from tostlm.data.shards import (
    HELDOUT,
    MANIFEST,
    SCHEMA,
    TRAIN,
    Manifest,
    ShardWriter,
    dtype_for,
    write_manifest,
)
from tostlm.data.sources import documents
from tostlm.data.tokenizer import Tokenizer
from tostlm.errors import UserError
from tostlm.files import require_writable

BATCH_CHARACTERS = 4_000_000  # text tokenized at once, which bounds the memory


def prepare(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    *,
    text_column: str = "text",
    heldout_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    threads: int = os.cpu_count() or 1,
) -> Manifest:
    """Tokenize every document of the sources into shards under `out`, which appears whole or not at all.

    Which documents are held out is a function of their text alone, so the same document is on the same side
    however often and from wherever it is prepared.

    Raises:
        UserError: a source or `out` cannot be used.
    """
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"heldout_fraction {heldout_fraction} must be at least 0 and below 1")
    if (out / MANIFEST).exists():
        raise UserError(f"{out} is prepared already; remove it to prepare it again, or choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no prepared data; choose an --out that does not exist")
    require_writable(out.parent)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        manifest = _write(
            documents(sources, text_column),
            sources,
            tokenizer,
            partial,
            heldout_fraction,
            shard_tokens,
            threads,
        )
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(
    texts: Iterable[str],
    sources: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    heldout_fraction: float,
    shard_tokens: int,
    threads: int,
) -> Manifest:
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype, shard_tokens) for split in (TRAIN, HELDOUT)}
    with tqdm(desc="prepare", unit=" documents", disable=None) as bar:
        tokens_done = 0
        for batch in _batches(texts):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch, threads), strict=True):
                data = text.encode()
                writers[_split_of(data, heldout_fraction)].add([*tokens, tokenizer.eos_id], len(data))
                tokens_done += len(tokens) + 1
            bar.update(len(batch))
            bar.set_postfix(tokens=tokens_done)
    (folder / tokenizer.file_name).write_bytes(tokenizer.content)
    manifest = Manifest(
        schema_version=SCHEMA,
        dtype=dtype,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sources=tuple(sources),
        heldout_fraction=heldout_fraction,
        splits={split: writer.finish() for split, writer in writers.items()},
    )
    write_manifest(folder, manifest)
    return manifest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split_of(text: bytes, heldout_fraction: float) -> str:
    """The split of a document, by its content: a hash, read as a number in [0, 1)."""
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return HELDOUT if number < heldout_fraction else TRAIN
