"""The interface of every tokenizer, and how a tokenizer's file is found and read."""

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

METASPACE = "\u2581"  # SentencePiece, and tokenizers that follow it, write a space inside a piece as this character
# Texts that show what a tokenizer loses: normalization, a small alphabet and a decoder that tidies spaces all show.
PROBE_TEXTS = (
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
    """Convert text to token ids and back.

    One of the tokens is the end-of-document token (EOS), which preparation writes after every document. Encoding never
    makes it from text. Each file format is a subclass in a file of its own, whose constructor sets the attributes;
    its definition registers it.

    Args:
        content: the bytes of the tokenizer's file.

    Raises:
        UserError: the content is damaged or names no end-of-document token.
    """

    file_name: ClassVar[str]  # the name of the tokenizer's file in prepared folders and checkpoints
    vocab_size: int  # the number of token ids; every id is below it
    eos_id: int  # the id of the end-of-document token

    def __init__(self, content: bytes) -> None:
        self.content = content

    @classmethod
    @abstractmethod
    def recognizes(cls, content: bytes) -> bool:
        """Return whether a file with this content is of this class's format, judged by its first bytes."""

    @staticmethod
    def from_bytes(content: bytes) -> Tokenizer:
        """Return the tokenizer in a file's content, of the class that recognizes it.

        Raises:
            UserError: no class recognizes the content, or it cannot be used.
        """
        for tokenizer_class in Tokenizer.__subclasses__():
            if tokenizer_class.recognizes(content):
                return tokenizer_class(content)
        raise UserError("it is not a tokenizer: neither a SentencePiece model nor a tokenizer.json")

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a tokenizer from its file, a SentencePiece .model or a tokenizer.json.

        Raises:
            UserError: the file does not exist or cannot be used.
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
    def from_folder(folder: Path) -> Tokenizer:
        """Read the tokenizer of a prepared folder or a checkpoint; raise UserError as `find_file` and `load` do."""
        return Tokenizer.load(Tokenizer.find_file(folder))

    @staticmethod
    def find_file(folder: Path) -> Path:
        """Return the path of the one tokenizer file in a folder.

        Raises:
            UserError: the folder holds no tokenizer file, or several.
        """
        names = Tokenizer.file_names()
        found = [name for name in names if (folder / name).is_file()]
        if not found:
            raise UserError(f"{folder} has no {' or '.join(names)}; check the path, or make the folder again")
        if len(found) > 1:
            raise UserError(f"{folder} has both {' and '.join(found)}; name the file to use")
        return folder / found[0]

    @staticmethod
    def file_names() -> list[str]:
        """Return the names that a tokenizer's file may have in a folder."""
        return sorted(tokenizer_class.file_name for tokenizer_class in Tokenizer.__subclasses__())

    @property
    @abstractmethod
    def pieces(self) -> list[str]:
        """Every token as the tokenizer's file spells it, in the order of ids; "" for an id without a token."""

    @property
    def eos_token(self) -> str:
        """The end-of-document token as the tokenizer's file spells it."""
        return self.pieces[self.eos_id]

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the tokenizer's file, by which shards, checkpoints and exports identify the tokenizer."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """The UTF-8 bytes of text each token stands for, an integer array [vocab_size].

        Special tokens count 0. A space that the tokenizer adds before a text counts in the text's first token.
        """

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end-of-document token."""
        return self.encode_batch([text], threads=1)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Return the token ids of each text, as `encode` does, computed on `threads` threads."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids.

        End-of-document tokens are left out, bytes that are not UTF-8 become U+FFFD, and a space that the tokenizer adds
        before each document is removed, so the ids must start at the start of a document.
        """
        documents = itertools.groupby(tokens, lambda token: token == self.eos_id)
        return "".join(self._decode_document(list(document)) for is_end, document in documents if not is_end)

    @abstractmethod
    def _decode_document(self, tokens: list[int]) -> str:
        """Return the text of the token ids of one document, without its end-of-document token."""

    def find_lossy_text(self) -> str | None:
        """Encode and decode probe texts; return a description of the first that changes, or None if none does."""
        for text in PROBE_TEXTS:
            decoded = self.decode(self.encode(text))
            if decoded != text:
                return f"it changes {text!r} into {decoded!r}"
        return None
