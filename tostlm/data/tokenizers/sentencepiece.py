"""SentencePiece models: those that `tostlm tokenizer train` makes and others, as Llama 2's or Mistral's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import sentencepiece

from tostlm.data.tokenizers.base import METASPACE, Tokenizer
from tostlm.errors import UserError

# The tags of a ModelProto's fields 1 to 5, one of which is the first byte of every model
# (google/sentencepiece, src/sentencepiece_model.proto).
MODEL_PROTO_TAGS = b"\x0a\x12\x1a\x22\x2a"
# Appended to a model, fields replace those before them: normalizer_spec (3) { add_dummy_prefix (3): false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its `</s>` is the end-of-document token.

    SentencePiece itself reads U+2581 as a space. With a model that has byte fallback, the parts of a text around U+2581
    are encoded separately and the character becomes its three bytes, so that nothing is lost.
    """

    file_name = "tokenizer.model"

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._processor = _load_model(content)
        self.eos_id, self.vocab_size = self._processor.eos_id(), self._processor.vocab_size()
        if self.eos_id < 0:
            raise UserError(
                "the tokenizer has no end-of-document token (</s>); train one with `tostlm tokenizer train`"
            )
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in METASPACE.encode()]
        self._metaspace_ids = byte_ids if all(map(self._processor.is_byte, byte_ids)) else None
        self.adds_space = self._text(self._processor.encode("a")).startswith(" ")
        # Encodes what comes after the start of a text, where the model adds no space.
        self._continuation = _load_model(content + NO_DUMMY_PREFIX) if self.adds_space else self._processor

    @classmethod
    def recognizes(cls, content: bytes) -> bool:
        return content[:1] != b"" and content[:1] in MODEL_PROTO_TAGS and not content.lstrip().startswith(b"{")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(self._bytes_of(token)) for token in range(self.vocab_size)])

    @cached_property
    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(token) for token in range(self.vocab_size)]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        if self._metaspace_ids is not None:
            for index, text in enumerate(texts):
                if METASPACE in text:
                    encoded[index] = self._encode_around_metaspace(text, self._metaspace_ids)
        return encoded

    def _encode_around_metaspace(self, text: str, metaspace_ids: list[int]) -> list[int]:
        first, *rest = self._continuation.encode(((" " if self.adds_space else "") + text).split(METASPACE))
        return list(itertools.chain(first, *([*metaspace_ids, *part] for part in rest)))

    def _decode_document(self, tokens: list[int]) -> str:
        text = self._text(tokens)
        return text.removeprefix(" ") if self.adds_space else text

    def _text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._bytes_of, tokens)).decode(errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        """Return the UTF-8 bytes of text that a token stands for."""
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(METASPACE, " ").encode()


def _load_model(content: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(f"not a SentencePiece model: {error}") from None
