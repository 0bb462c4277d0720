"""Token shards on disk: raw little-endian ids, where each document ends, and a manifest that says what they are.

A prepared folder holds

    manifest.json               written last: a folder without one is unfinished
    tokenizer.model | .json     what the ids mean
    SPLIT-00000.bin             token ids, uint16 or uint32, one document after another, each with its document end
    SPLIT-00000.ends            uint64, for each document of that shard the number of shard tokens up to its end
    SPLIT-00000.hashes          16 bytes for each document of that shard, by which the same text is known again

docs/data.md is the format's specification.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import pydantic

from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import sha256_of, write_atomically

SCHEMA = 2
MANIFEST = "manifest.json"
TRAIN, VALIDATION = "train", "heldout"
SUFFIXES = ("bin", "ends", "hashes")
HASH_BYTES = 16


Count = Annotated[int, pydantic.Field(ge=0)]


class FrozenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Shard(FrozenModel):
    """One group of files NAME.bin, NAME.ends, NAME.hashes."""

    name: Annotated[str, pydantic.Field(pattern=r"^\w+-\d{5,}$")]  # SPLIT-NNNNN
    tokens: Count
    documents: Count
    text_bytes: Count  # UTF-8 bytes of the text
    sha256: dict[str, str]  # of each file, by suffix


class Split(FrozenModel):
    tokens: Count
    documents: Count
    text_bytes: Count
    shards: tuple[Shard, ...]

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> Split:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("its shards' tokens do not add up")
        return self

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Split:
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=tuple(shards),
        )


class Manifest(FrozenModel):
    schema_version: int
    dtype: Literal["<u2", "<u4"]
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    sources: tuple[str, ...]
    heldout_fraction: float
    command: str  # that made the folder
    settings: dict[str, Any]  # that decided what is in it
    dropped: dict[str, int]  # documents left out, by reason
    splits: dict[str, Split]

    @classmethod
    def of(cls, tokenizer: Tokenizer, **described: Any) -> Manifest:
        """The manifest of a folder in this version's schema; `described` are the fields the tokenizer does not tell."""
        return cls(
            schema_version=SCHEMA,
            dtype=dtype_for(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            **described,
        )

    @property
    def content_sha256(self) -> str:
        """The identity of the tokens, whoever prepared them with whatever command."""
        splits = json.dumps([[name, split.model_dump()] for name, split in sorted(self.splits.items())])
        return hashlib.sha256(f"{self.tokenizer_sha256}{splits}".encode()).hexdigest()


class ShardWriter:
    """Writes one split, a new shard every `shard_tokens` tokens; a document never straddles two shards."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[Shard] = []
        self._ends: list[int] = []
        self._hashes: list[bytes] = []
        self._text_bytes: list[int] = []
        self._file: BinaryIO | None = None

    @property
    def _name(self) -> str:
        """Of the shard being written."""
        return shard_name(self._split, len(self._shards))

    def add(self, tokens: Sequence[int] | np.ndarray, content_hash: bytes, text_bytes: int) -> None:
        """Write one document, its document end included; `content_hash` is `content_hash` of its text."""
        if self._file is None:
            self._file = (self._folder / f"{self._name}.bin").open("wb")
        self._file.write(np.asarray(tokens, dtype=self._dtype).tobytes())
        self._ends.append(len(tokens) + (self._ends[-1] if self._ends else 0))
        self._hashes.append(content_hash)
        self._text_bytes.append(text_bytes)
        if self._ends[-1] >= self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        name = self._name
        (self._folder / f"{name}.ends").write_bytes(np.array(self._ends, "<u8").tobytes())
        (self._folder / f"{name}.hashes").write_bytes(b"".join(self._hashes))
        (self._folder / f"{name}.lengths").write_bytes(np.array(self._text_bytes, "<u4").tobytes())
        self._shards.append(describe_shard(self._folder, name, self._ends[-1], self._text_bytes))
        self._ends, self._hashes, self._text_bytes = [], [], []

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard; returns what was written."""
        self._finish_shard()
        return tuple(self._shards)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def describe_shard(folder: Path, name: str, tokens: int, text_bytes: Sequence[int]) -> Shard:
    """The manifest's entry for a shard's files, one of `text_bytes` a document."""
    return Shard(
        name=name,
        tokens=tokens,
        documents=len(text_bytes),
        text_bytes=sum(text_bytes),
        sha256={suffix: sha256_of(folder / f"{name}.{suffix}") for suffix in SUFFIXES},
    )


def content_hash(text: bytes) -> bytes:
    """What a document is known by: the first half of the SHA-256 of its text in UTF-8, 16 bytes."""
    return hashlib.sha256(text).digest()[:HASH_BYTES]


def dtype_for(vocab_size: int) -> Literal["<u2", "<u4"]:
    """The narrowest dtype that holds every id below `vocab_size`, little-endian.

    Raises:
        UserError: there is none.
    """
    if vocab_size > 1 << 32:
        raise UserError(f"a vocabulary of {vocab_size} does not fit the shards' 32 bits; use one of at most {1 << 32}")
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        UserError: there is none, or it is not one this version reads.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no prepared data; make it with `tostlm prepare --out {folder}`")
    try:
        content = json.loads(path.read_bytes())
        version = content.get("schema_version")
        if version != SCHEMA:
            raise UserError(f"{path} is of schema {version}, this tostlm reads {SCHEMA}; prepare the data again")
        return Manifest.model_validate(content)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); prepare the data again") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer a prepared folder was made with.

    Raises:
        UserError: it is missing, or not the one of the manifest.
    """
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{folder / tokenizer.file_name} is not the tokenizer the shards were made with (sha256 "
            f"{tokenizer.sha256[:12]}, manifest {manifest.tokenizer_sha256[:12]}); prepare the data again"
        )
    return tokenizer


def common_tokenizer(folders: Sequence[Path], vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer that all of several prepared folders were made with.

    Args:
        folders: the prepared folders.
        vocab_size: that of a model that must be able to embed every token; None without a model.

    Raises:
        UserError: the folders were made with different tokenizers, or `vocab_size` is less than the tokenizer's.
    """
    first, *others = folders
    tokenizer = load_tokenizer(first)
    for folder in others:
        if load_tokenizer(folder).sha256 != tokenizer.sha256:
            raise UserError(f"{first} and {folder} were prepared with different tokenizers; prepare one of them again")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size} is smaller than the {tokenizer.vocab_size} pieces of the tokenizer of "
            f"{first}; raise model.vocab_size"
        )
    return tokenizer
