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
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydantic

from tostlm.data.tokenizer import Tokenizer
from tostlm.errors import UserError
from tostlm.files import sha256_of, write_atomically

SCHEMA = 2
MANIFEST = "manifest.json"
TRAIN, HELDOUT = "train", "heldout"
SUFFIXES = ("bin", "ends", "hashes")
HASH_BYTES = 16


class Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Shard(Record):
    """One group of files NAME.bin, NAME.ends, NAME.hashes."""

    name: str  # SPLIT-NNNNN
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the text
    sha256: dict[str, str]  # of each file, by suffix


class Split(Record):
    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Split:
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=tuple(shards),
        )


class Manifest(Record):
    schema_version: int
    dtype: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    sources: tuple[str, ...]
    heldout_fraction: float
    command: str  # that made the folder
    settings: dict[str, Any]  # that decided what is in it
    dropped: dict[str, int]  # documents left out, by reason
    splits: dict[str, Split]


class TokenSet:
    """One split of a prepared folder, as one long array of tokens, mapped into memory.

    Raises:
        UserError: the folder is unfinished or of another format, a shard is missing or cut short, the split is empty.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self._name = folder, split
        self.manifest = read_manifest(folder)
        if split not in self.manifest.splits:
            raise UserError(f"{folder} has no split {split!r}, only {', '.join(self.manifest.splits)}")
        self.split = self.manifest.splits[split]
        if not self.split.tokens:
            raise UserError(
                f"the {split} split of {folder} holds no tokens; prepare more documents, or another --heldout-fraction "
                f"than {self.manifest.heldout_fraction}"
            )
        self._tokens = [
            self._map(shard.name + ".bin", self.manifest.dtype, shard.tokens) for shard in self.split.shards
        ]
        self._ends = [self._map(shard.name + ".ends", "<u8", shard.documents) for shard in self.split.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.split.shards)])

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        path = self.folder / name
        expected = count * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(f"shard {path} has {found} bytes, its manifest says {expected}; prepare the data again")
        return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)

    def __len__(self) -> int:
        return self.split.tokens

    def __str__(self) -> str:
        return f"the {self._name} split of {self.folder}"

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of the split, across shards, as int64.

        Raises:
            UserError: an id is outside the vocabulary, so the shard is damaged.
        """
        parts = []
        shard = bisect_right(self._starts, start) - 1
        while start < stop:
            base = int(self._starts[shard])
            part = self._tokens[shard][start - base : stop - base].astype(np.int64)
            if part.size and part.max() >= self.manifest.vocab_size:
                name = self.folder / f"{self.split.shards[shard].name}.bin"
                raise UserError(
                    f"shard {name} holds token {part.max()}, beyond its vocabulary of {self.manifest.vocab_size}: "
                    f"it is damaged; see `tostlm data verify {self.folder}`"
                )
            parts.append(part)
            start = base + len(self._tokens[shard])
            shard += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def shard_bounds(self) -> Iterator[np.ndarray]:
        """Of one shard after another, `document_bounds` of its documents."""
        for ends, base in zip(self._ends, self._starts, strict=False):
            edges = np.concatenate([[0], ends.astype(np.int64)]) + base
            yield np.stack([edges[:-1], edges[1:]], axis=1)

    @cached_property
    def document_bounds(self) -> np.ndarray:
        """First and past-the-last token of every document, its document end included: [documents, 2]."""
        return np.concatenate(list(self.shard_bounds()))


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


def dtype_for(vocab_size: int) -> str:
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
    tokenizer = Tokenizer.of_folder(folder)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{folder / tokenizer.file_name} is not the tokenizer the shards were made with (sha256 "
            f"{tokenizer.sha256[:12]}, manifest {manifest.tokenizer_sha256[:12]}); prepare the data again"
        )
    return tokenizer


def verify(folder: Path) -> Iterator[str]:
    """Read every byte of a prepared folder; yields the name of each file found whole.

    Raises:
        UserError: a file's checksum is not the manifest's.
    """
    manifest = read_manifest(folder)
    yield load_tokenizer(folder).file_name
    for name, split in manifest.splits.items():
        if split.tokens:
            TokenSet(folder, name)
        for shard in split.shards:
            for suffix, expected in shard.sha256.items():
                file = f"{shard.name}.{suffix}"
                if not (folder / file).is_file() or sha256_of(folder / file) != expected:
                    raise UserError(
                        f"shard {folder / file} is damaged: its SHA-256 is not the manifest's; prepare again"
                    )
                yield file
