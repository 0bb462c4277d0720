"""Shards hold exactly the documents, and damage is found."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tostlm.data import HELDOUT, TRAIN, Tokenizer, TokenSet, load_tokenizer, prepare, read_manifest, verify
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


def test_a_document_is_held_out_by_its_text_alone(
    data: Path, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "again.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches[::-1]))
    prepare([str(tmp_path / "again.jsonl")], tokenizer, tmp_path / "again", heldout_fraction=0.2)
    assert set(texts_of(tmp_path / "again", HELDOUT)) == set(texts_of(data, HELDOUT))


def test_shard_sizes_and_threads_change_nothing(data: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare([str(corpus)], tokenizer, tmp_path / "small", heldout_fraction=0.2, shard_tokens=7000, threads=1)
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


def test_dtype_is_the_narrowest() -> None:
    assert [dtype_for(v) for v in (256, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]


def test_verify_reads_every_byte(copy: Path) -> None:
    assert len(list(verify(copy))) == 5
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


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"schema_version": 9}', "of schema 9, this tostlm reads 1"), ("{", "is damaged"), ("[]", "is damaged")],
)
def test_a_manifest_that_cannot_be_read(copy: Path, content: str, words: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_manifest(copy)


def test_another_tokenizer_in_the_folder(copy: Path, speeches: list[str], tmp_path: Path) -> None:
    from tostlm.data import train_tokenizer

    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    (copy / "tokenizer.model").write_bytes(other.content)
    with pytest.raises(UserError, match="is not the tokenizer the shards were made with"):
        load_tokenizer(copy)


def test_nothing_appears_when_it_fails(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' * 10 + '{"text": 7}\n')
    with pytest.raises(UserError):
        prepare([str(tmp_path / "bad.jsonl")], tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_prepared_data_is_not_overwritten(copy: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="is prepared already"):
        prepare([str(corpus)], tokenizer, copy)
    assert (copy / "manifest.json").read_bytes() == before
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="exists and is no prepared data"):
        prepare([str(corpus)], tokenizer, copy)


def test_an_unfinished_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenSet(tmp_path, TRAIN)
