"""Token files of other stacks, brought into prepared folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tostlm.data.preparation.prepare import is_heldout
from tostlm.data.preparation.token_files import megatron_documents, nanogpt_documents
from tostlm.data.shards import (
    TRAIN,
    VALIDATION,
    Manifest,
    ShardWriter,
    Split,
    content_hash,
    dtype_for,
    write_manifest,
)
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import require_writable, write_atomically

READERS = {"nanogpt": nanogpt_documents, "megatron": megatron_documents}


def import_tokens(
    kind: str,
    sources: Sequence[Path],
    heldout: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    heldout_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    command: str = "",
) -> Manifest:
    """Copy tokens of another stack's files into shards under `out`, which appears whole or not at all.

    `kind` is "nanogpt" (raw uint16 ids) or "megatron" (a prefix of .bin and .idx). Documents of `heldout` are held out;
    without it, `heldout_fraction` of all are, by their content as ever.

    Raises:
        UserError: a file is not of that kind, holds ids beyond the tokenizer's, or `out` exists.
    """
    if kind not in READERS:
        raise UserError(f"--from {kind} is not known; use {' or '.join(READERS)}")
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"--heldout-fraction {heldout_fraction} must be at least 0 and below 1")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another --out")
    require_writable(out.parent)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        dtype = dtype_for(tokenizer.vocab_size)
        writers = {split: ShardWriter(partial, split, dtype, shard_tokens) for split in (TRAIN, VALIDATION)}
        for split, tokens in _documents(kind, sources, heldout, tokenizer):
            text = tokenizer.decode(tokens.tolist()).encode()
            known_by = content_hash(text)
            if split is None:
                split = VALIDATION if is_heldout(known_by, heldout_fraction) else TRAIN
            writers[split].add(np.append(tokens, tokenizer.eos_id), known_by, len(text))
        manifest = Manifest.of(
            tokenizer,
            sources=tuple(str(source) for source in (*sources, *heldout)),
            heldout_fraction=0.0 if heldout else heldout_fraction,
            command=command,
            settings={"from": kind, "shard_tokens": shard_tokens},
            dropped={},
            splits={split: Split.of(writer.finish()) for split, writer in writers.items()},
        )
        for leftover in partial.glob("*.lengths"):
            leftover.unlink()
        write_atomically(partial / tokenizer.file_name, tokenizer.content)
        write_manifest(partial, manifest)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _documents(
    kind: str, sources: Sequence[Path], heldout: Sequence[Path], tokenizer: Tokenizer
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Every document with the split it is told to be in, None where its content decides."""
    for paths, split in ((sources, TRAIN if heldout else None), (heldout, VALIDATION)):
        for path in paths:
            for tokens in READERS[kind](path, tokenizer.eos_id, tokenizer.vocab_size):
                yield split, tokens
