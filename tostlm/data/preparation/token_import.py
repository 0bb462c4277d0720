"""Token files of other programs, imported into prepared folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tostlm.data.preparation.prepare import batches
from tostlm.data.preparation.token_files import megatron_documents, nanogpt_documents
from tostlm.data.shards import TEXT_BYTES_SUFFIX, TRAIN, VALIDATION, Manifest, SplitWriter, write_manifest
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import atomic_folder, require_writable, write_atomically

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
    """Copy the documents of other programs' token files into a prepared folder, which appears whole or not at all.

    Args:
        kind: "nanogpt" (raw uint16 ids) or "megatron" (each source a prefix of .bin and .idx).
        sources: the token files.
        heldout: token files whose documents are all held out. Without any, `heldout_fraction` of all documents are.
        tokenizer: the tokenizer that the ids belong to.

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
    with atomic_folder(out) as folder:
        writer = SplitWriter(folder, tokenizer, heldout_fraction, shard_tokens)
        for paths, split in ((sources, TRAIN if heldout else None), (heldout, VALIDATION)):
            for path in paths:
                for batch in batches(READERS[kind](path, tokenizer.eos_id, tokenizer.vocab_size)):
                    encoded = [tokens.tolist() for tokens in batch]
                    writer.add(encoded, [tokenizer.decode(ids).encode() for ids in encoded], split)
        shards = writer.finish()
        if not any(shards.values()):
            raise UserError(
                f"{', '.join(map(str, [*sources, *heldout]))}: there is no document, only ends of documents"
            )
        for path in folder.glob(f"*.{TEXT_BYTES_SUFFIX}"):
            path.unlink()
        write_atomically(folder / tokenizer.file_name, tokenizer.content)
        return write_manifest(
            folder,
            tokenizer,
            shards,
            sources=[str(source) for source in (*sources, *heldout)],
            heldout_fraction=0.0 if heldout else heldout_fraction,
            command=command,
            settings={"from": kind, "shard_tokens": shard_tokens},
            dropped={},
        )
