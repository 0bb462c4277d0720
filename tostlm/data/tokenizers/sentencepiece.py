"""SentencePiece models: those trained here and others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import sentencepiece

from tostlm.data.tokenizers.base import SENTENCEPIECE_FILE, SPACE, Tokenizer
from tostlm.errors import UserError

# A protobuf message goes on with fields that replace the earlier: normalizer_spec (3) { add_dummy_prefix (3): false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its `</s>` is the document end.

    SentencePiece reads U+2581 as a space, so with byte fallback text that holds it is encoded around it and the
    character itself as its three bytes.
    """

    file_name = SENTENCEPIECE_FILE

    def __init__(self, content: bytes) -> None:
        """`content` is that of a .model file.

        Raises:
            UserError: it is no SentencePiece model, or one without a document end.
        """
        super().__init__(content)
        self._processor = _processor(content)
        if self.eos_id < 0:
            raise UserError("the tokenizer has no document end (</s>); train one with `tostlm tokenizer train`")
        bytes_of_space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_bytes = bytes_of_space if all(map(self._processor.is_byte, bytes_of_space)) else None
        self.adds_space = self._text(self._processor.encode("a")).startswith(" ")
        self._continued = _processor(content + NO_DUMMY_PREFIX) if self.adds_space else self._processor

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def eos_id(self) -> int:
        return int(self._processor.eos_id())

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(self._bytes_of(token)) for token in range(self.vocab_size)])

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(token) for token in range(self.vocab_size)]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        if self._space_bytes is not None:
            for index, text in enumerate(texts):
                if SPACE in text:
                    encoded[index] = self._encode_around_spaces(text, self._space_bytes)
        return encoded

    def _encode_around_spaces(self, text: str, space_bytes: list[int]) -> list[int]:
        first, *rest = self._continued.encode(((" " if self.adds_space else "") + text).split(SPACE))
        return list(itertools.chain(first, *([*space_bytes, *part] for part in rest)))

    def _decode_document(self, tokens: list[int]) -> str:
        text = self._text(tokens)
        return text.removeprefix(" ") if self.adds_space else text

    def _text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._bytes_of, tokens)).decode(errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"not a SentencePiece model: {error}") from None
    if not model:
        raise UserError("not a SentencePiece model: the file is empty")
    return processor
