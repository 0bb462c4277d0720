"""The format of prepared folders: token shards and the manifest that describes them.

A prepared folder holds

    manifest.json               written last: a folder without one is unfinished
    tokenizer.model | .json     what the ids mean
    SPLIT-00000.bin             token ids, uint16 or uint32, documents each followed by an end-of-document token
    SPLIT-00000.ends            uint64, for each document of that shard the number of shard tokens up to its end
    SPLIT-00000.hashes          16 bytes for each document of that shard, that are equal for equal texts

docs/data.md is the format's specification.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import pydantic

from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError, error_summary
from tostlm.files import sha256_of, sync_tree, write_atomically

MANIFEST, DROPPED = "manifest.json", "dropped.jsonl"
SEAL = "sha256"  # key of the manifest: the hash of all others
TRAIN, VALIDATION = "train", "heldout"
SUFFIXES = ("bin", "ends", "hashes")
TEXT_BYTES_SUFFIX = "lengths"  # uint32, UTF-8 bytes of each document's text; kept until the shards are merged
HASH_BYTES = 16

Count = Annotated[int, pydantic.Field(ge=0)]


class FrozenModel(pydantic.BaseModel):
    """A record with fixed fields, stored as JSON."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self:
        """Return the record that a JSON file holds.

        Raises:
            UserError: the file does not hold one; the message ends with `remedy`.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except pydantic.ValidationError as error:
            wrong = describe_problem(error)
            raise UserError(f"{path} is damaged or of another version ({wrong}); {remedy}") from None


def describe_problem(error: pydantic.ValidationError) -> str:
    """Return the first thing that is wrong with a record."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'content'} {problem['input']!r:.40}: {problem['msg']}"


class Shard(FrozenModel):
    """One group of files NAME.bin, NAME.ends, NAME.hashes."""

    name: Annotated[str, pydantic.Field(pattern=r"^\w+-\d{5,}$")]  # SPLIT-NNNNN
    tokens: Count
    documents: Count
    text_bytes: Count  # UTF-8 bytes of the text
    sha256: dict[str, str]  # of each file, by suffix


class Split(FrozenModel):
    """The shards of one split and their sums."""

    tokens: Count
    documents: Count
    text_bytes: Count
    shards: tuple[Shard, ...]

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("its shards' tokens do not add up")
        return self


class Manifest(FrozenModel):
    """The content of a prepared folder's manifest.json."""

    schema_version: Literal[3] = 3
    dtype: Literal["<u2", "<u4"]
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    sources: tuple[str, ...]
    heldout_fraction: float
    command: str  # that made the folder
    settings: dict[str, object]  # that decided what is in it
    dropped: dict[str, int]  # documents left out, by reason
    dropped_sha256: str | None  # of dropped.jsonl, which names the first of them
    splits: dict[str, Split]

    @property
    def content_sha256(self) -> str:
        """The identity of the tokens, whoever prepared them with whatever command."""
        splits = json.dumps([[name, split.model_dump()] for name, split in sorted(self.splits.items())])
        return hashlib.sha256(f"{self.tokenizer_sha256}{splits}".encode()).hexdigest()


class SplitWriter:
    """Writes documents to the shards of the training and the held-out split of a folder.

    A document never straddles two shards: a shard ends with the document that reaches `shard_tokens` tokens.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, heldout_fraction: float, shard_tokens: int) -> None:
        self._eos_id, self._heldout_fraction = tokenizer.eos_id, heldout_fraction
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._writers = {split: _ShardsWriter(folder, split, shard_tokens) for split in (TRAIN, VALIDATION)}

    def add(self, encoded: Sequence[Sequence[int]], texts: Sequence[bytes], split: str | None = None) -> None:
        """Write the ids of documents, whose UTF-8 are `texts`, with an end-of-document token after each.

        Without a `split` a document's text decides where it belongs, by its hash read as a number in [0, 1).
        """
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        text_tokens = np.fromiter(itertools.chain.from_iterable(encoded), self._dtype, lengths.sum())
        tokens = np.insert(text_tokens, np.cumsum(lengths), self._eos_id)
        digests = np.frombuffer(b"".join([sha256.digest() for sha256 in map(hashlib.sha256, texts)]), np.uint8)
        hashes = np.ascontiguousarray(digests.reshape(len(texts), -1)[:, :HASH_BYTES])
        documents = Documents(tokens, lengths + 1, hashes, np.fromiter(map(len, texts), "<u4", len(texts)))
        if split is None:
            held_out = hashes.view(">u8")[:, 0] / 2.0**64 < self._heldout_fraction
            self._writers[VALIDATION].add(documents.chosen(held_out))
            self._writers[TRAIN].add(documents.chosen(~held_out))
        else:
            self._writers[split].add(documents)

    def finish(self) -> dict[str, tuple[Shard, ...]]:
        """Close the last shards; return all shards by split."""
        return {split: writer.finish() for split, writer in self._writers.items()}


class Documents(NamedTuple):
    """Some documents as a shard's files hold them."""

    tokens: np.ndarray  # of all, each document's end-of-document token included
    lengths: np.ndarray  # int64 [documents], tokens of each
    hashes: np.ndarray  # uint8 [documents, HASH_BYTES]
    text_bytes: np.ndarray  # uint32 [documents], UTF-8 bytes of each text

    def chosen(self, chosen: np.ndarray) -> Documents:
        """Return the documents where a bool array [documents] is true."""
        if chosen.all():
            return self
        rest = (array[chosen] for array in self[1:])
        return Documents(self.tokens[np.repeat(chosen, self.lengths)], *rest)

    def divided(self, count: int) -> tuple[Documents, Documents]:
        """Return the first `count` documents, and the others."""
        tokens = int(self.lengths[:count].sum())
        return (
            Documents(self.tokens[:tokens], *(array[:count] for array in self[1:])),
            Documents(self.tokens[tokens:], *(array[count:] for array in self[1:])),
        )


class _ShardsWriter:
    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._shards: list[Shard] = []
        self._open: ShardWriter | None = None

    def add(self, documents: Documents) -> None:
        while len(documents.lengths):
            if self._open is None:
                self._open = ShardWriter(self._folder, shard_name(self._split, len(self._shards)))
            missing = self._shard_tokens - self._open.tokens
            count = int(np.searchsorted(np.cumsum(documents.lengths), missing)) + 1  # to the one that reaches it
            part, documents = documents.divided(count)
            self._open.add(part)
            if self._open.tokens >= self._shard_tokens:
                self.finish()

    def finish(self) -> tuple[Shard, ...]:
        if self._open is not None:
            self._shards.append(self._open.finish())
            self._open = None
        return tuple(self._shards)


class ShardWriter:
    """Writes the files of one shard, some documents at a time; nothing of them stays in memory.

    `tokens` is how many are written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.tokens = self._documents = self._text_bytes = 0
        self._name = name
        self._files = {suffix: (folder / f"{name}.{suffix}").open("wb") for suffix in (*SUFFIXES, TEXT_BYTES_SUFFIX)}
        self._digests = {suffix: hashlib.sha256() for suffix in self._files}

    def add(self, documents: Documents) -> None:
        """Append documents."""
        ends = (self.tokens + np.cumsum(documents.lengths)).astype("<u8")
        self.tokens += len(documents.tokens)
        self._documents += len(documents.lengths)
        self._text_bytes += int(documents.text_bytes.sum(dtype=np.int64))
        arrays = (documents.tokens, ends, documents.hashes, documents.text_bytes)
        for (suffix, file), array in zip(self._files.items(), arrays, strict=True):
            self._digests[suffix].update(array.tobytes())
            file.write(array.tobytes())

    def finish(self) -> Shard:
        """Close the files; return the shard's entry in the manifest."""
        for file in self._files.values():
            file.close()
        return Shard(
            name=self._name,
            tokens=self.tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            sha256={suffix: self._digests[suffix].hexdigest() for suffix in SUFFIXES},
        )


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def dtype_for(vocab_size: int) -> Literal["<u2", "<u4"]:
    """Return the narrowest little-endian dtype that holds every id below `vocab_size`.

    Raises:
        UserError: there is none.
    """
    if vocab_size > 1 << 32:
        raise UserError(f"a vocabulary of {vocab_size} does not fit the shards' 32 bits; use one of at most {1 << 32}")
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_manifest(
    folder: Path,
    tokenizer: Tokenizer,
    shards: Mapping[str, Sequence[Shard]],
    *,
    sources: Sequence[str],
    heldout_fraction: float,
    command: str,
    settings: Mapping[str, object],
    dropped: Mapping[str, int],
) -> Manifest:
    """Write and return the manifest of a folder that holds `shards` by split, which makes it a prepared folder."""
    manifest = Manifest(
        dtype=dtype_for(tokenizer.vocab_size),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sources=tuple(sources),
        heldout_fraction=heldout_fraction,
        command=command,
        settings=dict(settings),
        dropped=dict(dropped),
        splits={
            split: Split(
                tokens=sum(shard.tokens for shard in of_split),
                documents=sum(shard.documents for shard in of_split),
                text_bytes=sum(shard.text_bytes for shard in of_split),
                shards=tuple(of_split),
            )
            for split, of_split in shards.items()
        },
        dropped_sha256=sha256_of(folder / DROPPED) if (folder / DROPPED).exists() else None,
    )
    sync_tree(folder)  # before the manifest says that all is there
    content = manifest.model_dump(mode="json")
    write_atomically(folder / MANIFEST, json.dumps({**content, SEAL: _digest(content)}, indent=2) + "\n")
    return manifest


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a prepared folder.

    Raises:
        UserError: there is none, or it is not one that this version reads.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no prepared data; make it with `tostlm prepare --out {folder}`")
    damaged = f"{path} is damaged or of another version ({{}}); prepare the data again"
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop(SEAL)
        manifest = Manifest.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        raise UserError(damaged.format(describe_problem(error))) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(damaged.format(f"it cannot be read: {error_summary(error)}")) from None
    if seal != _digest(content):
        raise UserError(damaged.format("its content is not what was written"))
    return manifest


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that a prepared folder was made with.

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
    for key in ("vocab_size", "eos_id"):
        if (stored := getattr(manifest, key)) != (own := getattr(tokenizer, key)):
            raise UserError(f"{folder / MANIFEST} has {key} {stored}, its tokenizer {own}; prepare the data again")
    return tokenizer


def common_tokenizer(folders: Sequence[Path], vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer of several prepared folders; `vocab_size` is that of a model that must embed every token.

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
