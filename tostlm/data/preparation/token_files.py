"""Readers of other programs' token files: nanoGPT's .bin and Megatron-LM's indexed datasets.

Both yield documents in the file's order, each an int64 array [tokens] of ids below the vocabulary's size and without
the end-of-document token. That token ends a document wherever it is, so it may follow every document, precede it, or be
missing after the last; documents without tokens are left out.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tostlm.errors import UserError

CHUNK = 1 << 20  # numbers read at once, which bounds the memory beside one document's
LONGEST = 1 << 28  # tokens of one document; with a wrong end-of-document token, a whole file would be read as one
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document indices
VERSION = 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point


def nanogpt_documents(path: Path, eos_id: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the documents of nanoGPT's train.bin or val.bin: raw little-endian uint16.

    Raises:
        UserError: the file is missing, empty or of an odd size, an id is not below `vocab_size`, or a document is too
            long.
    """
    size = _size(path)
    if not size or size % 2:
        raise UserError(f"{path} has {size} bytes; a file of uint16 tokens has an even number above 0: copy it again")
    counts = (min(CHUNK, size // 2 - start) for start in range(0, size // 2, CHUNK))
    with path.open("rb") as file:
        pieces = (_read(file, "<u2", count, vocab_size, path) for count in counts)
        yield from _documents(itertools.chain(pieces, [np.array([eos_id])]), eos_id, path)


class MegatronIndex(NamedTuple):
    """The content of PREFIX.idx, mapped into memory."""

    dtype: str
    sizes: np.ndarray  # int32 [sequences], ids of each
    pointers: np.ndarray  # int64 [sequences], its first byte in PREFIX.bin
    bounds: np.ndarray  # int64 [documents + 1], each document's first sequence, and the number of sequences


def megatron_documents(prefix: Path, eos_id: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the documents of Megatron-LM's PREFIX.idx and PREFIX.bin, which are one or more sequences each, joined.

    Raises:
        UserError: a file is missing, cut short or damaged, its ids are no integers, or one is not below `vocab_size`.
    """
    index_path, path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    index = _read_index(index_path)
    _check_index(index, index_path, _size(path), path)
    counts = (int(index.sizes[a:b].sum(dtype=np.int64)) for a, b in itertools.pairwise(index.bounds))
    with path.open("rb") as file:
        pieces = (np.append(_read(file, index.dtype, count, vocab_size, path), eos_id) for count in counts)
        yield from _documents(pieces, eos_id, path)


def _read_index(path: Path) -> MegatronIndex:
    size = _size(path)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(
            f"{path} does not begin as an index of Megatron-LM, with {MAGIC!r} and counts; check the prefix"
        )
    _, version, code, sequences, indices = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, this tostlm reads {VERSION}; convert it with Megatron-LM")
    if code not in DTYPES:
        raise UserError(f"{path} has dtype code {code}, no integers; token ids have one of {[*DTYPES]}")
    if not sequences or not indices:
        raise UserError(f"{path} says there are {sequences} sequences and {indices} document indices, so no documents")
    expected = HEADER.size + 12 * sequences + 8 * indices
    if size not in (expected, expected + sequences):  # multimodal indices end in a byte a sequence
        raise UserError(f"{path} has {size} bytes, its header says {expected}; it is damaged: copy it again")
    pointers_at = HEADER.size + 4 * sequences
    return MegatronIndex(
        DTYPES[code],
        np.asarray(np.memmap(path, "<i4", "r", HEADER.size, (sequences,))),
        np.asarray(np.memmap(path, "<i8", "r", pointers_at, (sequences,))),
        np.asarray(np.memmap(path, "<i8", "r", pointers_at + 8 * sequences, (indices,))),
    )


def _check_index(index: MegatronIndex, path: Path, bin_bytes: int, bin_path: Path) -> None:
    """Check that the sequences fill PREFIX.bin without gaps and that documents are made of all of them, in order."""
    width = np.dtype(index.dtype).itemsize
    end = 0
    for start in range(0, len(index.sizes), CHUNK):
        sizes = index.sizes[start : start + CHUNK].astype(np.int64) * width
        ends = end + np.cumsum(sizes)
        if sizes.min() < 0 or not np.array_equal(index.pointers[start : start + CHUNK], ends - sizes):
            raise UserError(f"{path} is damaged: its sequences do not lie one after another; copy it again")
        end = int(ends[-1])
    if end != bin_bytes:
        raise UserError(f"{bin_path} has {bin_bytes} bytes, {path} says {end}; one of the two is damaged: copy both")
    bounds = index.bounds
    if (bounds[1:] < bounds[:-1]).any():
        raise UserError(f"{path} is damaged: its document indices do not ascend; copy it again")
    if bounds[0] != 0 or bounds[-1] != len(index.sizes):
        raise UserError(
            f"{path} is damaged: its document indices go from {bounds[0]} to {bounds[-1]}, not from 0 to its "
            f"{len(index.sizes)} sequences; copy it again"
        )


def _size(path: Path) -> int:
    if not path.is_file():
        raise UserError(f"{path} is no file; check the path")
    return path.stat().st_size


def _read(file: BinaryIO, dtype: str, count: int, vocab_size: int, path: Path) -> np.ndarray:
    """Return the next ids of a file, which are all there and below `vocab_size`."""
    _require_short(count, path)
    ids = np.fromfile(file, dtype, count)
    if len(ids) != count:
        raise UserError(f"{path} was cut short while it was read; run again when nothing writes it")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise UserError(
            f"{path} holds token {wrong[0]}, outside the vocabulary of {vocab_size}: it was made with another "
            "tokenizer, or is damaged; name the tokenizer it was made with"
        )
    return ids.astype(np.int64)


def _documents(pieces: Iterable[np.ndarray], eos_id: int, path: Path) -> Iterator[np.ndarray]:
    """Yield the ids between end-of-document tokens, of which the last id is one."""
    begun: list[np.ndarray] = []  # of the document whose end is not read yet
    for ids in pieces:
        rest, *others = np.split(ids, np.flatnonzero(ids == eos_id))
        begun.append(rest)
        for following in others:
            document = np.concatenate(begun)
            if len(document):
                yield document
            begun = [following[1:]]
        _require_short(sum(map(len, begun)), path)


def _require_short(count: int, path: Path) -> None:
    if count > LONGEST:
        raise UserError(
            f"{path} has a document of over {LONGEST:,} tokens; check that it was made with the end-of-document token "
            "of the tokenizer that --tokenizer names"
        )
