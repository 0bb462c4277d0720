"""decode(encode(x)) == x for every text, and an identity that is checked."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tostlm.data import Tokenizer, train_tokenizer
from tostlm.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TRAPS = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t x\r\n",
    "\u2581x \u2581\u2581 y",
    "\0",
    "<s></s><unk><0x0A><|endoftext|>",
    "1234567890 3.14",
    "e\u0301 \ufb01 \u00a0\u3000",
    "\u6f22\u5b57 \U0001f642\u200d\U0001f469",
]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS | st.sampled_from(TRAPS))
def test_nothing_is_lost(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TRAPS)
def test_traps(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_id not in tokens
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())


def test_real_text(tokenizer: Tokenizer, speeches: list[str]) -> None:
    batch = tokenizer.encode_batch(speeches, threads=2)
    assert [tokenizer.decode(tokens) for tokens in batch] == speeches
    assert batch == [tokenizer.encode(text) for text in speeches]
    assert sum(map(len, batch)) < sum(len(text) for text in speeches) / 2  # it compresses


def test_digits_stand_alone_and_the_end_is_no_text(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1789")) == 4
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]) == "ab"


def test_training_is_reproducible(speeches: list[str], tmp_path: Path) -> None:
    models = [train_tokenizer(speeches, 400, tmp_path / f"{n}.model") for n in (1, 2)]
    assert models[0].sha256 == models[1].sha256
    assert Tokenizer.load(tmp_path / "1.model").sha256 == models[0].sha256


def test_training_reads_no_more_than_it_is_told(speeches: list[str], tmp_path: Path) -> None:
    short = train_tokenizer(speeches[:20], 400, tmp_path / "short.model")
    told = train_tokenizer(speeches, 400, tmp_path / "told.model", sum(len(t.encode()) for t in speeches[:20]))
    assert told.sha256 == short.sha256


def broken() -> Iterator[str]:
    yield "a line\n" * 100
    raise ValueError("broken source")


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size 5000 does not fit this text"):
        train_tokenizer(["a few words"], 5000, tmp_path / "t.model")
    with pytest.raises(UserError, match="the 256 bytes"):
        train_tokenizer(["a few words"], 258, tmp_path / "t.model")
    with pytest.raises(ValueError, match="broken source"):
        train_tokenizer(broken(), 400, tmp_path / "t.model")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


def test_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.model is no file"):
        Tokenizer.load(tmp_path / "missing.model")
    (tmp_path / "junk.model").write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "junk.model")


def test_a_lossy_tokenizer_is_refused(speeches: list[str], tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(speeches).splitlines()),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=400,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="needs a lossless one"):
        Tokenizer.load(tmp_path / "lossy.model")
