"""What every tokenizer does: text to token ids and back, and an identity. The kinds are in files beside this one."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from tostlm.errors import UserError

SPACE = "\u2581"  # how SentencePiece, and what is made like it, writes a space inside its pieces
SENTENCEPIECE_FILE, FAST_FILE = "tokenizer.model", "tokenizer.json"
# Between them what normalisation, a small alphabet or a tidy decoder changes.
PROBES = (
    "plain words",
    " one space first",
    "  two  spaces \n\n\tand a tab\r\n",
    "UPPER and lower, isn't it .",
    "e\u0301 \u00e9 \ufb01 \u00bd \u00a0\u3000\u200d",
    "\u6f22\u5b57 \u0939\u093f \U0001f642 \U00010348",
    "\u2581 a \u2581b",
    "\0 \x07",
)


class Tokenizer(ABC):
    """Text to token ids and back. The document end is one of its tokens and is never made from text."""

    file_name: ClassVar[str]  # what its file is called in prepared data and checkpoints

    def __init__(self, content: bytes) -> None:
        self.content = content  # of its file

    @staticmethod
    def from_bytes(content: bytes) -> Tokenizer:
        """The tokenizer that a file's content holds, of the kind it shows.

        Raises:
            UserError: it is of no kind, or names no document end.
        """
        if content.lstrip()[:1] == b"{":
            from tostlm.data.tokenizers.fast import FastTokenizer

            return FastTokenizer(content)
        from tostlm.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(content)

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a tokenizer's file, SentencePiece's .model or a tokenizer.json.

        Raises:
            UserError: there is none at `path`, or it cannot be used.
        """
        if not path.is_file():
            raise UserError(
                f"tokenizer {path} is no file; make one with `tostlm tokenizer train` or `tostlm tokenizer import`, or "
                "check the path"
            )
        try:
            return Tokenizer.from_bytes(path.read_bytes())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @staticmethod
    def of_folder(folder: Path) -> Tokenizer:
        """The tokenizer of prepared data or of a checkpoint.

        Raises:
            UserError: the folder holds none, or two, or it cannot be used.
        """
        return Tokenizer.load(tokenizer_file(folder))

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The document end, the token after every document."""

    @property
    def end_piece(self) -> str:
        """The document end as the tokenizer's file spells it."""
        return self.pieces()[self.eos_id]

    @cached_property
    def sha256(self) -> str:
        """The tokenizer's identity, which shards, checkpoints and exports carry."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text each token stands for, [vocab_size]; of document ends and other marks, 0.

        A space that a tokenizer adds before a text counts as one of its first token's.
        """

    @abstractmethod
    def pieces(self) -> list[str]:
        """Every token as the tokenizer's file spells it, in the order of ids; "" for an id without a token."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a document end."""
        return self.encode_batch([text], threads=1)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Token ids of many texts, on `threads` threads."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; document ends are dropped, bytes that are no UTF-8 become U+FFFD.

        `tokens` begin where a document does: a space that the tokenizer adds before each is dropped.
        """
        documents = itertools.groupby(tokens, lambda token: token == self.eos_id)
        return "".join(self._decode_document(list(document)) for is_end, document in documents if not is_end)

    @abstractmethod
    def _decode_document(self, tokens: list[int]) -> str: ...

    def loss(self) -> str | None:
        """What encoding and decoding change in probe texts; None where they change nothing."""
        for text in PROBES:
            found = self.decode(self.encode(text))
            if found != text:
                return f"it changes {text!r} into {found!r}"
        return None


def tokenizer_file(folder: Path) -> Path:
    """The one tokenizer file in a folder.

    Raises:
        UserError: there is none, or there are two.
    """
    found = [folder / name for name in (SENTENCEPIECE_FILE, FAST_FILE) if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no {SENTENCEPIECE_FILE} or {FAST_FILE}; check the path, or make it again")
    if len(found) > 1:
        raise UserError(f"{folder} has both {SENTENCEPIECE_FILE} and {FAST_FILE}; name the one to use")
    return found[0]
