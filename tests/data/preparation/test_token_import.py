"""Token files of other programs become prepared folders that hold the same tokens."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import fail, succeed, tostlm
from tests.data.preparation.test_token_files import write_megatron
from tests.data.test_shards import texts_of
from tostlm.data import TRAIN, VALIDATION, PreparationSettings, Tokenizer, TokenSet, import_tokens, prepare, verify
from tostlm.errors import UserError


@pytest.fixture
def documents(speeches: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer.encode_batch(speeches, threads=1)


def write_nanogpt(path: Path, documents: list[list[int]], eos_id: int) -> Path:
    path.write_bytes(np.array([token for tokens in documents for token in (*tokens, eos_id)], "<u2").tobytes())
    return path


def test_nanogpt_as_nanogpt_splits_it(documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = write_nanogpt(tmp_path / "train.bin", documents[:50], tokenizer.eos_id)
    val = write_nanogpt(tmp_path / "val.bin", documents[50:], tokenizer.eos_id)
    import_tokens("nanogpt", [train], [val], tokenizer, tmp_path / "out", shard_tokens=20_000)
    list(verify(tmp_path / "out"))
    for file, split in ((train, TRAIN), (val, VALIDATION)):
        found = TokenSet(tmp_path / "out", split)
        assert np.array_equal(found.read(0, len(found)), np.fromfile(file, "<u2"))
    assert not list((tmp_path / "out").glob("*.lengths"))


def test_imported_and_prepared_are_the_same(
    documents: list[list[int]], speeches: list[str], corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_megatron(tmp_path / "mega", [[[*tokens, tokenizer.eos_id]] for tokens in documents], end=False)
    import_tokens("megatron", [tmp_path / "mega"], [], tokenizer, tmp_path / "out", heldout_fraction=0.2)
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2), tokenizer, tmp_path / "prepared")
    for name in ("train-00000.bin", "train-00000.ends", "train-00000.hashes", "heldout-00000.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "prepared" / name).read_bytes()
    assert sorted(texts_of(tmp_path / "out", TRAIN) + texts_of(tmp_path / "out", VALIDATION)) == sorted(speeches)


def test_what_cannot_be_imported(documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = write_nanogpt(tmp_path / "train.bin", [[600]], tokenizer.eos_id)
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    command = ["data", "import", str(train), "--tokenizer", str(tmp_path / "t.model"), "--out", str(tmp_path / "out")]
    fail(tostlm(*command, "--from", "nanogpt"), "600")
    fail(tostlm(*command, "--from", "npy"), "--from npy is not known; use nanogpt or megatron")
    fail(tostlm(*command, "--from", "nanogpt", "--heldout-fraction", "1"), "--heldout-fraction 1.0 must be")
    assert not list(tmp_path.glob("*out*"))
    write_nanogpt(train, documents, tokenizer.eos_id)
    assert "train" in succeed(tostlm(*command, "--from", "nanogpt"))
    with pytest.raises(UserError, match="exists"):
        import_tokens("nanogpt", [train], [], tokenizer, tmp_path / "out")
