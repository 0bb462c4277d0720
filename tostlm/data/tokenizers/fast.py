"""Hugging Face's fast tokenizers: one tokenizer.json, whatever its model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import tokenizers

from tostlm.data.tokenizers.base import FAST_FILE, SPACE, Tokenizer
from tostlm.errors import UserError

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's alphabet: how byte-level tokenizers write each byte as a character that can be seen.
BYTE_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


class FastTokenizer(Tokenizer):
    """A tokenizer.json whose post-processor appends the document end, and nothing else, to a text.

    Text that spells a special token is encoded as any other text.
    """

    file_name = FAST_FILE

    def __init__(self, content: bytes) -> None:
        """`content` is that of a tokenizer.json.

        Raises:
            UserError: it is none, or does not say what its document end is.
        """
        super().__init__(content)
        self._fast = parse(content)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        end = appended_token(self._fast)
        if end is None:
            raise UserError(
                "the tokenizer does not say what ends a document; use `tostlm tokenizer import` on it first"
            )
        self._eos_id = end
        # Some models hold the end's name as a word of their own, and would find it in text.
        self._end_spelled = [t.id for character in self.end_piece for t in self._fast.model.tokenize(character)]

    @property
    def vocab_size(self) -> int:
        return len(self.pieces())

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @cached_property
    def _pieces(self) -> list[str]:
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(vocabulary.values()) + 1)
        for piece, token in vocabulary.items():
            pieces[token] = piece
        return pieces

    def pieces(self) -> list[str]:
        return list(self._pieces)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """See Tokenizer; where pieces are no bytes or SentencePiece's, the bytes a token adds after another."""
        kinds = set(_types(json.loads(self.content).get("decoder")))
        special = {token for token, added in self._fast.get_added_tokens_decoder().items() if added.special}
        if kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            sizes = [_size(piece, "ByteLevel" in kinds, "ByteFallback" in kinds) for piece in self.pieces()]
        else:
            before = self.encode("a")
            pairs = self._fast.decode_batch([before, *([*before, token] for token in range(self.vocab_size))])
            alone, *sizes = [len(text.encode()) for text in pairs]
            sizes = [max(0, size - alone) for size in sizes]
        return np.array([0 if token in special else size for token, size in enumerate(sizes)])

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        # tokenizers takes its threads from the environment, their number once, when it first needs any.
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_end(encoding.ids) for encoding in encodings]

    def _without_end(self, tokens: list[int]) -> list[int]:
        if self._eos_id not in tokens:
            return tokens
        return list(chain.from_iterable(self._end_spelled if t == self._eos_id else [t] for t in tokens))

    def _decode_document(self, tokens: list[int]) -> str:
        return str(self._fast.decode(tokens, skip_special_tokens=True))


def parse(content: bytes) -> tokenizers.Tokenizer:
    """A tokenizer.json as the `tokenizers` package reads it.

    Raises:
        UserError: it is none.
    """
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"not a tokenizer.json: {error}") from None


def appended_token(fast: tokenizers.Tokenizer) -> int | None:
    """The one token the post-processor puts after a text; None where it does anything else."""
    alone, text, whole = fast.encode("").ids, fast.encode("a", add_special_tokens=False).ids, fast.encode("a").ids
    return alone[0] if len(alone) == 1 and whole == text + alone else None


def _types(part: Any) -> Iterator[str]:
    """The types of a part of a tokenizer.json, and of those it is a sequence of."""
    if part is not None:
        yield part["type"]
        for inner in part.get("decoders", ()):
            yield from _types(inner)


def _size(piece: str, byte_level: bool, byte_fallback: bool) -> int:
    if byte_level:
        return len(piece) if all(character in _BYTES for character in piece) else len(piece.encode())
    if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace(SPACE, " ").encode())
