"""Training a lossless SentencePiece tokenizer on a uniform sample of documents."""

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

EOS_TOKEN = "<|endoftext|>"
MAX_LINE_BYTES = 1 << 16  # SentencePiece skips longer training lines, so they are split here


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: Path, sample_bytes: int = 1_000_000_000, seed: int = 0
) -> SentencePieceTokenizer:
    """Train a lossless BPE tokenizer of `vocab_size` pieces, 256 bytes among them; write its .model file atomically.

    It is trained on a uniform sample of `sample_bytes` of the documents, which SentencePiece holds in memory. The model
    depends on the documents, the seed of the sample and the options, not on the order of the documents.

    Raises:
        UserError: there is no text, or not enough for `vocab_size` pieces.
    """
    documents = sample_texts(texts, sample_bytes, seed)
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
            eos_piece=EOS_TOKEN,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        rule = (
            f"it gives at most {most[1]} pieces"
            if most
            else "256 bytes, 2 special tokens and the text's characters need a piece each"
        )
        raise UserError(
            f"vocab_size {vocab_size} does not fit this text: {rule}; choose another size, or more text"
        ) from None
    tokenizer = SentencePieceTokenizer(model.getvalue())
    write_atomically(out, tokenizer.content)
    return tokenizer


def limit_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield documents until they have `limit` bytes of UTF-8 or more; the last one is not cut."""
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text


def sample_texts(texts: Iterable[str], limit: int, seed: int) -> list[bytes]:
    """Return the UTF-8 of a uniform sample of documents, at most `limit` bytes, in random order.

    The documents are ranked by a hash of the seed and their text, and the first that fit are taken, so the sample does
    not depend on their order in `texts`. A document longer than `limit` is cut to it. Memory holds the sample and one
    document at most.
    """
    key = seed.to_bytes(8, "little")
    kept: list[tuple[int, bytes]] = []  # a heap of (-rank, text), so that the highest rank is removed first
    size, lowest_removed = 0, 1 << 64  # documents of this rank and above no longer fit
    for text in texts:
        data = text.encode()
        rank = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
        if rank >= lowest_removed:
            continue
        data = data if len(data) <= limit else data[:limit].decode(errors="ignore").encode()
        heapq.heappush(kept, (-rank, data))
        size += len(data)
        while size > limit:
            negative_rank, removed = heapq.heappop(kept)
            size, lowest_removed = size - len(removed), -negative_rank
    return [data for _, data in sorted(kept, reverse=True)]


def _training_lines(documents: list[bytes]) -> Iterator[str]:
    """Yield lines that are short enough for SentencePiece; empties `documents`, so that memory holds the text once."""
    longest = MAX_LINE_BYTES // 4  # in characters, which have four bytes at most
    documents.reverse()
    while documents:
        for line in documents.pop().decode().splitlines():
            for start in range(0, len(line), longest):
                if part := line[start : start + longest].replace("\0", ""):
                    yield part
