"""Hugging Face's fast tokenizers: a tokenizer.json with any model (BPE, WordPiece, Unigram)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import tokenizers

from tostlm.data.tokenizers.base import METASPACE, Tokenizer
from tostlm.errors import UserError

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# The printable character by which byte-level tokenizers write each byte, as `bytes_to_unicode` in openai/gpt-2.
BYTE_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


class FastTokenizer(Tokenizer):
    """A tokenizer.json whose post-processor appends the end-of-document token to a text and does nothing else.

    Text that spells a special token is encoded like any other text.
    """

    file_name = "tokenizer.json"

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._fast = parse_tokenizer_json(content)
        self._fast.encode_special_tokens = True
        eos_id = appended_token(self._fast)
        if eos_id is None:
            raise UserError(
                "the tokenizer does not say which token ends a document; use `tostlm tokenizer import` on it first"
            )
        self.eos_id, self.vocab_size = eos_id, len(self.pieces)
        # Some models have the name of the EOS token as an ordinary word and would find it in text: such a text gets
        # the ids of the name's characters instead.
        self._eos_characters = [t.id for character in self.eos_token for t in self._fast.model.tokenize(character)]

    @classmethod
    def recognizes(cls, content: bytes) -> bool:
        return content.lstrip().startswith(b"{")

    @cached_property
    def pieces(self) -> list[str]:
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(vocabulary.values()) + 1)
        for piece, token in vocabulary.items():
            pieces[token] = piece
        return pieces

    @cached_property
    def token_bytes(self) -> np.ndarray:
        kinds = set(_decoder_types(json.loads(self.content).get("decoder")))
        special = {token for token, added in self._fast.get_added_tokens_decoder().items() if added.special}
        if kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            sizes = [_piece_bytes(piece, "ByteLevel" in kinds, "ByteFallback" in kinds) for piece in self.pieces]
        else:
            # Other decoders do not spell bytes in their pieces: count the bytes a token adds after another one.
            before = self.encode("a")
            texts = self._fast.decode_batch([before, *([*before, token] for token in range(self.vocab_size))])
            alone, *sizes = [len(text.encode()) for text in texts]
            sizes = [max(0, size - alone) for size in sizes]
        return np.array([0 if token in special else size for token, size in enumerate(sizes)])

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        # tokenizers reads the number of threads from the environment, only once, when it first starts any.
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._replace_eos(encoding.ids) for encoding in encodings]

    def _replace_eos(self, tokens: list[int]) -> list[int]:
        if self.eos_id not in tokens:
            return tokens
        return list(chain.from_iterable(self._eos_characters if t == self.eos_id else [t] for t in tokens))

    def _decode_document(self, tokens: list[int]) -> str:
        return str(self._fast.decode(tokens, skip_special_tokens=True))


def parse_tokenizer_json(content: bytes) -> tokenizers.Tokenizer:
    """Return the content of a tokenizer.json as a tokenizer of the `tokenizers` package that neither cuts nor pads.

    Raises:
        UserError: the content is not a tokenizer.json.
    """
    try:
        fast = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"not a tokenizer.json: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def appended_token(fast: tokenizers.Tokenizer) -> int | None:
    """Return the token that the post-processor appends to a text; None if it does anything else."""
    empty, text, processed = fast.encode("").ids, fast.encode("a", add_special_tokens=False).ids, fast.encode("a").ids
    return empty[0] if len(empty) == 1 and processed == text + empty else None


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    """Yield the type of a decoder in a tokenizer.json and, if it is a sequence, of the decoders in it."""
    if decoder is not None:
        yield decoder["type"]
        for inner in decoder.get("decoders", ()):
            yield from _decoder_types(inner)


def _piece_bytes(piece: str, byte_level: bool, byte_fallback: bool) -> int:
    """Return the UTF-8 bytes of text a piece stands for."""
    if byte_level:
        return len(piece) if all(character in _BYTES for character in piece) else len(piece.encode())
    if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace(METASPACE, " ").encode())
