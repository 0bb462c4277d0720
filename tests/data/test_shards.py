"""Shards hold exactly the documents, and damage is found."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tostlm.data import HELDOUT, TRAIN, Settings, Tokenizer, TokenSet, load_tokenizer, prepare, verify
from tostlm.data.shards import dtype_for
from tostlm.errors import UserError


def texts_of(folder: Path, split: str) -> list[str]:
    tokens, tokenizer = TokenSet(folder, split), load_tokenizer(folder)
    found = []
    for start, stop in tokens.document_bounds.tolist():
        document = tokens.tokens(start, stop)
        assert document[-1] == tokenizer.eos_id
        found.append(tokenizer.decode(document[:-1].tolist()))
    return found


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def test_every_document_is_in_one_split(data: Path, speeches: list[str]) -> None:
    train, heldout = texts_of(data, TRAIN), texts_of(data, HELDOUT)
    assert sorted(train + heldout) == sorted(speeches)
    assert len(heldout) > 3
    assert not set(train) & set(heldout)


def test_shard_sizes_change_nothing(data: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(Settings(sources=(str(corpus),), heldout_fraction=0.2, shard_tokens=7000), tokenizer, tmp_path / "small")
    whole, small = TokenSet(data, TRAIN), TokenSet(tmp_path / "small", TRAIN)
    assert len(small.split.shards) > 5
    assert np.array_equal(whole.tokens(0, len(whole)), small.tokens(0, len(small)))
    assert np.array_equal(whole.tokens(6000, 25_000), small.tokens(6000, 25_000))  # across shards
    assert np.array_equal(whole.document_bounds, small.document_bounds)


def test_the_format_is_readable_with_numpy(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    tokens = np.fromfile(data / f"{shard['name']}.bin", manifest["dtype"])
    ends = np.fromfile(data / f"{shard['name']}.ends", "<u8")
    assert len(tokens) == shard["tokens"] == ends[-1]
    assert (tokens[ends - 1] == manifest["eos_id"]).all()
    hashes = np.fromfile(data / f"{shard['name']}.hashes", "V16")
    first = load_tokenizer(data).decode(tokens[: ends[0] - 1].tolist())
    assert hashes[0].tobytes() == hashlib.sha256(first.encode()).digest()[:16]


def test_dtype_is_the_narrowest() -> None:
    assert [dtype_for(v) for v in (256, 65_536, 65_537, 1 << 32)] == ["<u2", "<u2", "<u4", "<u4"]
    with pytest.raises(UserError, match="a vocabulary of 4294967297 does not fit"):
        dtype_for((1 << 32) + 1)


def test_verify_reads_every_byte(copy: Path) -> None:
    assert len(list(verify(copy))) == 7
    shard = copy / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1234] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged"):
        list(verify(copy))


def test_a_shard_cut_short(copy: Path) -> None:
    os.truncate(copy / "train-00000.bin", 1000)
    with pytest.raises(UserError, match=r"train-00000\.bin has 1000 bytes, its manifest says \d+"):
        TokenSet(copy, TRAIN)


def test_a_token_beyond_the_vocabulary(copy: Path) -> None:
    tokens = np.memmap(copy / "train-00000.bin", "<u2", mode="r+")
    tokens[50] = 60_000
    tokens.flush()
    with pytest.raises(UserError, match="holds token 60000, beyond its vocabulary of 512"):
        TokenSet(copy, TRAIN).tokens(0, 100)


def test_an_unfinished_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenSet(tmp_path, TRAIN)
