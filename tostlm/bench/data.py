"""Speed of preparation beside that of the tokenizer's library alone, and of the writer and the loader."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

from tostlm.bench.report import report
from tostlm.data import (
    TRAIN,
    BatchStage,
    Loader,
    PreparationSettings,
    Tokenizer,
    TokenSet,
    documents,
    limit_bytes,
    prepare,
)
from tostlm.data.shards import SplitWriter
from tostlm.data.tokenizers import SentencePieceTokenizer
from tostlm.files import require_file_writable

RANK_TOKENS_PER_SECOND = 10_000  # what the loader's share of a step is stated for
LOADED_TOKENS = 1 << 20


class DataRates(NamedTuple):
    """Medians of interleaved runs, of the same text."""

    text_bytes: int
    documents: int
    encode_bytes_per_second: float  # of the tokenizer's library alone, on text in memory
    prepare_bytes_per_second: float  # from a .jsonl file to verified shards
    writer_bytes_per_second: float  # of text, on one core: hashing, converting, writing
    loader_seconds_per_token: float


def report_data(
    sources: list[str],
    tokenizer: Tokenizer,
    text_bytes: int,
    document_characters: int | None,
    workers: int,
    context: int,
    repeats: int,
    out: Path | None,
) -> str:
    """Time encoding, preparing and loading of text in turns, and return the table of their speeds.

    Args:
        text_bytes: how much of the sources to use; they are repeated where they are shorter.
        document_characters: cut longer documents into documents of this length; None for none.
        context: tokens of the windows that are loaded.
        out: a .json file to write too.

    Raises:
        UserError: a source cannot be read, or `out` not written.
    """
    if out:
        require_file_writable(out)
    own = list(limit_bytes(documents(sources), text_bytes))
    if document_characters:
        own = [part for text in own for part in _cut(text, document_characters)]
    texts = list(limit_bytes(itertools.cycle(own), text_bytes))
    size = sum(len(text.encode()) for text in texts)
    seconds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (folder / "text.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        settings = PreparationSettings(sources=(str(folder / "text.jsonl"),), unit_bytes=1 << 40, heldout_fraction=0)
        for repeat in range(repeats):
            prepared = folder / f"out-{repeat}"
            start = time.perf_counter()
            encoded = _library_encode(tokenizer, texts, workers)
            encoded_at = time.perf_counter()
            prepare(settings, tokenizer, prepared, workers=workers)
            prepared_at = time.perf_counter()
            _write(folder, tokenizer, texts, encoded)
            written_at = time.perf_counter()
            loading = _load(prepared, context)
            seconds.append((encoded_at - start, prepared_at - encoded_at, written_at - prepared_at, loading))
    encoding, preparing, writing, loading = map(statistics.median, zip(*seconds, strict=True))
    rates = DataRates(size, len(texts), size / encoding, size / preparing, size / writing, loading)
    facts = {"workers": workers, "context": context, "repeats": repeats, **rates._asdict()}
    return report(_table(rates, workers), torch.device("cpu"), out, **facts)


def _cut(text: str, characters: int) -> Iterator[str]:
    return (text[start : start + characters] for start in range(0, len(text), characters))


def _library_encode(tokenizer: Tokenizer, texts: list[str], workers: int) -> list[list[int]]:
    """Encode texts by the tokenizer's library, without what tostlm adds to SentencePiece."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.encode_batch(texts, workers)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    encoded: list[list[int]] = processor.encode(texts, num_threads=workers)
    return encoded


def _write(folder: Path, tokenizer: Tokenizer, texts: list[str], encoded: list[list[int]]) -> None:
    writer = SplitWriter(folder, tokenizer, heldout_fraction=0, shard_tokens=1 << 40)
    writer.add(encoded, [text.encode() for text in texts])
    writer.finish()


def _load(folder: Path, context: int) -> float:
    """Return the seconds per token of one rank's batches."""
    tokens = TokenSet(folder, TRAIN)
    context = min(context, len(tokens) - 1)
    sequences = max(1, LOADED_TOKENS // context // 8)
    loader = Loader([(tokens, 1.0)], [BatchStage(0, context, sequences)], seed=0, eos_id=tokens.manifest.eos_id)
    start = time.perf_counter()
    for step in range(8):
        loader.batch(step, 0, 1)
    return (time.perf_counter() - start) / (8 * sequences * context)


def _table(rates: DataRates, workers: int) -> str:
    """Return the rates and their ratios, a line each."""
    encode, prepare_, write = rates[2:5]
    share = rates.loader_seconds_per_token * RANK_TOKENS_PER_SECOND
    return "\n".join(
        (
            f"text                {rates.text_bytes / 1e6:10.1f} MB in {rates.documents:,} documents, {workers} cores",
            f"tokenizer's library {encode / 1e6:10.2f} MB/s",
            f"tostlm prepare      {prepare_ / 1e6:10.2f} MB/s   {prepare_ / encode:.0%} of it",
            f"writer, one core    {write / 1e6:10.2f} MB/s   {write * workers / encode:.1f} times it",
            f"loader              {1 / rates.loader_seconds_per_token / 1e6:10.2f} M tokens/s   "
            f"{share:.3%} of a step at {RANK_TOKENS_PER_SECOND:,} tokens/s",
        )
    )
