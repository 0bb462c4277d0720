"""Training a lossless SentencePiece tokenizer on a sample of a stream."""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from tostlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tostlm.errors import UserError
from tostlm.files import write_atomically

DOCUMENT_END = "<|endoftext|>"
MAX_LINE_BYTES = 1 << 16  # the longest training line: SentencePiece drops longer ones, so they are cut here


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: Path, sample_bytes: int = 1_000_000_000, seed: int = 0
) -> SentencePieceTokenizer:
    """Train a lossless BPE tokenizer and write its .model file to `out`, whole or not at all.

    SentencePiece holds its text in memory, so it gets a sample of `sample_bytes` of UTF-8: the same for the same
    documents and seed, in whatever order they come.

    Raises:
        UserError: there is no text, or too little of it for `vocab_size` pieces.
    """
    documents = sample(texts, sample_bytes, seed)
    if not documents:
        raise UserError("the source holds no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=MAX_LINE_BYTES,
            unk_id=0,
            eos_id=1,
            eos_piece=DOCUMENT_END,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        rule = (
            f"it gives at most {most[1]} pieces"
            if most
            else "the 256 bytes, the text's characters and 2 marks come first"
        )
        raise UserError(
            f"vocab_size {vocab_size} does not fit this text: {rule}; choose another, or more text"
        ) from None
    tokenizer = SentencePieceTokenizer(model.getvalue())
    write_atomically(out, tokenizer.content)
    return tokenizer


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The documents that begin in the first `limit` bytes of UTF-8."""
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text


def sample(texts: Iterable[str], limit: int, seed: int) -> list[bytes]:
    """A uniform sample of documents, at most `limit` bytes of UTF-8, in random order.

    A document's priority is a hash of the seed and its text, and those with the lowest that fit are the sample: it
    depends on the documents, not on their order. A document longer than `limit` is cut. Never more than the sample and
    one document are held.
    """
    key = seed.to_bytes(8, "little")
    kept: list[tuple[int, bytes]] = []  # a heap of (-priority, text): its first is the next to be dropped
    held, bound = 0, 1 << 64  # once a document is dropped, all of its priority or above are
    for text in texts:
        data = text.encode()
        priority = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
        if priority >= bound:
            continue
        data = data if len(data) <= limit else data[:limit].decode(errors="ignore").encode()
        heapq.heappush(kept, (-priority, data))
        held += len(data)
        while held > limit:
            dropped, data = heapq.heappop(kept)
            held, bound = held - len(data), -dropped
    return [data for _, data in sorted(kept, reverse=True)]


def _training_lines(documents: list[bytes]) -> Iterator[str]:
    """Lines none longer than SentencePiece reads; the documents are used up, so that memory holds them once."""
    longest = MAX_LINE_BYTES // 4  # characters: four bytes at the most each
    documents.reverse()
    while documents:
        for line in documents.pop().decode().splitlines():
            for start in range(0, len(line), longest):
                if piece := line[start : start + longest].replace("\0", ""):
                    yield piece
