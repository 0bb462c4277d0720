"""Shards hold exactly the documents, and damage is found."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tostlm.data import (
    TRAIN,
    VALIDATION,
    PreparationSettings,
    Tokenizer,
    TokenSet,
    prepare,
    shards,
    verify,
)
from tostlm.data.shards import dtype_for, load_tokenizer, read_manifest
from tostlm.errors import UserError


def texts_of(folder: Path, split: str) -> list[str]:
    tokens, tokenizer = TokenSet(folder, split), load_tokenizer(folder)
    found = []
    for start, stop in tokens.document_bounds.tolist():
        document = tokens.read(start, stop)
        assert document[-1] == tokenizer.eos_id
        found.append(tokenizer.decode(document[:-1].tolist()))
    return found


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def test_every_document_is_in_one_split(data: Path, speeches: list[str]) -> None:
    train, heldout = texts_of(data, TRAIN), texts_of(data, VALIDATION)
    assert sorted(train + heldout) == sorted(speeches)
    assert len(heldout) > 3
    assert not set(train) & set(heldout)


def test_shard_sizes_change_nothing(data: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(
        PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2, shard_tokens=7000),
        tokenizer,
        tmp_path / "small",
    )
    whole, small = TokenSet(data, TRAIN), TokenSet(tmp_path / "small", TRAIN)
    assert len(small.split.shards) > 5
    assert np.array_equal(whole.read(0, len(whole)), small.read(0, len(small)))
    assert np.array_equal(whole.read(6000, 25_000), small.read(6000, 25_000))  # across shards
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
    assert len(list(verify(copy))) == 8
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
        TokenSet(copy, TRAIN).read(0, 100)


def test_an_unfinished_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenSet(tmp_path, TRAIN)


def test_more_shards_than_files_may_be_open(corpus: Path, tokenizer: Tokenizer, data: Path, tmp_path: Path) -> None:
    one_a_document = PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2, shard_tokens=1)
    prepare(one_a_document, tokenizer, tmp_path / "many", workers=1)
    code = f"""
import resource
from pathlib import Path
from tostlm.data import TRAIN, TokenSet
from tostlm.data.loading import token_set
few = {len(TokenSet(tmp_path / "many", TRAIN).split.shards)} - 20
token_set.OPEN_SHARDS = 4
resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
tokens = TokenSet(Path({str(tmp_path / "many")!r}), TRAIN)
print(int(tokens.read(0, len(tokens)).sum()), len(tokens.document_bounds))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = TokenSet(data, TRAIN)
    assert done.stdout.split() == [str(whole.read(0, len(whole)).sum()), str(len(whole.document_bounds))]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.data())
def test_any_change_of_a_manifest_is_seen(copy: Path, changes: st.DataObject) -> None:
    original, manifest = (copy / "manifest.json").read_bytes(), read_manifest(copy)
    content = bytearray(original)
    for _ in range(changes.draw(st.integers(1, 3))):
        at = changes.draw(st.integers(0, len(content) - 1))
        content[at : at + changes.draw(st.integers(0, 5))] = changes.draw(st.binary(max_size=5))
    (copy / "manifest.json").write_bytes(content)
    try:
        assert read_manifest(copy) == manifest  # another space, or nothing
    except UserError as error:
        assert str(copy) in str(error)
    finally:
        (copy / "manifest.json").write_bytes(original)


def test_every_flipped_byte_of_a_manifest_is_seen(copy: Path) -> None:
    original, manifest = (copy / "manifest.json").read_bytes(), read_manifest(copy)
    unseen = []
    for at in range(len(original)):
        (copy / "manifest.json").write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        try:
            read_manifest(copy)
            unseen.append(at)
        except UserError:
            pass
    (copy / "manifest.json").write_bytes(original)
    assert not unseen
    assert read_manifest(copy) == manifest


def test_a_manifest_agrees_with_its_tokenizer(copy: Path, tokenizer: Tokenizer) -> None:
    """Written so by a program, whose seal is good."""
    manifest = read_manifest(copy)
    content = {**manifest.model_dump(mode="json"), "eos_id": tokenizer.eos_id + 2}
    (copy / "manifest.json").write_text(json.dumps({**content, "sha256": shards._digest(content)}))
    with pytest.raises(UserError, match=f"eos_id {tokenizer.eos_id + 2}, its tokenizer {tokenizer.eos_id}"):
        load_tokenizer(copy)


def test_a_shard_that_is_gone_by_the_time_it_is_read_is_named(copy: Path) -> None:
    tokens = TokenSet(copy, "train")
    (copy / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin has 0 bytes, its manifest says"):
        tokens.read(0, 10)
