"""A SentencePiece tokenizer that loses nothing: decode(encode(text)) == text for every Unicode text."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from tostlm.errors import UserError
from tostlm.files import write_atomically

DOCUMENT_END = "<|endoftext|>"
SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
MAX_LINE_BYTES = 1 << 16  # the longest training line: SentencePiece drops longer ones, so they are cut here


class Tokenizer:
    """Text to token ids and back. `</s>` of the model, the document-end token, is never made from text.

    SentencePiece reads U+2581 as a space, so text that holds it is encoded around it and the character itself as its
    three bytes.
    """

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a SentencePiece .model file.

        Raises:
            UserError: it is no SentencePiece model, or one that loses text (no byte fallback, normalisation).
        """
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model: {error}") from None
        if not model or self.eos_id < 0:
            raise UserError("the tokenizer has no document-end token (</s>); train one with `tostlm tokenizer train`")
        for probe in ("  two  spaces \n", "\u00e9 \ufb01 \U0001f642"):
            if self.decode(self.encode(probe)) != probe:
                raise UserError(
                    f"the tokenizer changes {probe!r} into {self.decode(self.encode(probe))!r}; tostlm needs a "
                    "lossless one (identity normalisation, byte fallback): train it with `tostlm tokenizer train`"
                )
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a .model file.

        Raises:
            UserError: there is none at `path`, or it cannot be used.
        """
        if not path.is_file():
            raise UserError(f"tokenizer {path} is no file; make one with `tostlm tokenizer train`, or check the path")
        try:
            return cls(path.read_bytes())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    file_name = "tokenizer.model"

    @property
    def content(self) -> bytes:
        return self.model

    @classmethod
    def of_folder(cls, folder: Path) -> Tokenizer:
        return cls.load(folder / cls.file_name)

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def eos_id(self) -> int:
        """The token after every document."""
        return int(self._processor.eos_id())

    @cached_property
    def sha256(self) -> str:
        """The tokenizer's identity, which shards, checkpoints and exports carry."""
        return hashlib.sha256(self.model).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text each token stands for, [vocab_size]; the document end is none."""
        return np.array([len(self._bytes_of(token)) for token in range(self.vocab_size)])

    def _bytes_of(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    @property
    def end_piece(self) -> str:
        """The document end as SentencePiece spells it."""
        return str(self._processor.id_to_piece(self.eos_id))

    def pieces(self) -> list[str]:
        """Every token as SentencePiece spells it, in the order of ids."""
        return [self._processor.id_to_piece(token) for token in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a document end."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Token ids of many texts, on `threads` threads."""
        parts = [text.split(SPACE) for text in texts]
        encoded = iter(self._processor.encode(list(itertools.chain.from_iterable(parts)), num_threads=threads))
        result = []
        for part in parts:
            tokens = next(encoded)
            for _ in part[1:]:
                tokens = [*tokens, *self._space_bytes, *next(encoded)]
            result.append(tokens)
        return result

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; document ends are dropped, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes_of, tokens)).decode(errors="replace")


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, text_bytes: int = 1_000_000_000) -> Tokenizer:
    """Train a lossless BPE tokenizer and write its .model file to `out`, whole or not at all.

    SentencePiece holds its text in memory, so only the first `text_bytes` of it are read; the same text gives the same
    tokenizer.

    Raises:
        UserError: there is no text, or too little of it for `vocab_size` pieces.
    """
    failures: list[Exception] = []
    lines = _remember_failure(_training_lines(texts, text_bytes), failures)
    first = next(lines, None)
    if first is None:
        raise UserError("the source holds no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
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
        if failures:
            raise failures[0] from None
        most = re.search(r"value <= (\d+)", str(error))
        rule = (
            f"it gives at most {most[1]} pieces"
            if most
            else "the 256 bytes, the text's characters and 2 marks come first"
        )
        raise UserError(
            f"vocab_size {vocab_size} does not fit this text: {rule}; choose another, or more text"
        ) from None
    tokenizer = Tokenizer(model.getvalue())
    write_atomically(out, tokenizer.model)
    return tokenizer


def _remember_failure(lines: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """The same lines; SentencePiece replaces what goes wrong in an iterator by a message of its own."""
    try:
        yield from lines
    except Exception as error:
        failures.append(error)
        raise


def _training_lines(texts: Iterable[str], text_bytes: int) -> Iterator[str]:
    """Lines of the first `text_bytes` of text, none longer than SentencePiece reads."""
    longest = MAX_LINE_BYTES // 4  # characters: four bytes at the most each
    for text in texts:
        if text_bytes <= 0:
            return
        text_bytes -= len(text.encode())
        for line in text.splitlines():
            for start in range(0, len(line), longest):
                if piece := line[start : start + longest].replace("\0", ""):
                    yield piece
