"""Properties of every kind of tokenizer: lossless ones lose nothing, and text never encodes to the EOS token."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tokenizers import tokenizer_kinds
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.data.tokenizers import FastTokenizer, SentencePieceTokenizer
from tostlm.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t x\r\n",
    "\u2581x \u2581\u2581 y",
    " \u2581",
    "\0",
    "<s></s><unk><0x0A><|endoftext|>",
    "1234567890 3.14",
    "e\u0301 \ufb01 \u00a0\u3000",
    "\u6f22\u5b57 \U0001f642\u200d\U0001f469",
]
Kinds = dict[str, Tokenizer]
LOSSLESS = ["trained", "mistral", "gpt2", "byte-level"]
LOSSY = ["metaspace", "spm default", "wordpiece", "unigram"]


@pytest.fixture(scope="module")
def kinds(tokenizer: Tokenizer, speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    folder = tmp_path_factory.mktemp("kinds")

    def imported(content: bytes) -> Tokenizer:
        (folder / "source").write_bytes(content)
        return import_tokenizer(folder / "source")

    return {
        "trained": tokenizer,
        "mistral": imported(tokenizer_kinds.mistral_like(speeches)),
        "gpt2": imported(tokenizer_kinds.ranks_file(tokenizer_kinds.gpt2_ranks())),
        "byte-level": imported(tokenizer_kinds.byte_level(speeches, ["<s>", "</s>"]).to_str().encode()),
        "metaspace": imported(tokenizer_kinds.metaspace(speeches).to_str().encode()),
        "spm default": imported(tokenizer_kinds.sentencepiece_model(speeches, vocab_size=500)),
        "wordpiece": import_tokenizer(_file(folder, tokenizer_kinds.wordpiece(speeches).to_str()), "[SEP]"),
        "unigram": imported(tokenizer_kinds.unigram(speeches).to_str().encode()),
    }


def _file(folder: Path, content: str) -> Path:
    (folder / "named").write_text(content)
    return folder / "named"


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=300)
@given(text=TEXTS | st.sampled_from(HARD_TEXTS))
def test_lossless_tokenizers_lose_nothing(kinds: Kinds, kind: str, text: str) -> None:
    tokenizer = kinds[kind]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_id not in tokens
    added = 1 if kind == "mistral" and text else 0  # the space it puts before every text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode()) + added


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_tokenizers_keep_and_compress_real_text(kinds: Kinds, kind: str, speeches: list[str]) -> None:
    tokenizer = kinds[kind]
    batch = tokenizer.encode_batch(speeches, threads=2)
    assert [tokenizer.decode(tokens) for tokens in batch] == speeches
    assert batch == [tokenizer.encode(text) for text in speeches] == tokenizer.encode_batch(speeches, threads=1)
    assert sum(map(len, batch)) < sum(len(text) for text in speeches) / 2


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_tokenizers_have_no_lossy_text(kinds: Kinds, kind: str) -> None:
    assert kinds[kind].find_lossy_text() is None


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("metaspace", r"changes '\u2581 a \u2581b' into"),  # it reads U+2581 in a text as a space
        ("spm default", r"changes ' one space first' into 'one space first'"),
        ("wordpiece", r"changes ' one space first' into 'one space first'"),
        ("unigram", r"changes ' one space first' into 'one space first'"),
    ],
)
def test_lossy_tokenizers_show_a_text_that_they_change(kinds: Kinds, kind: str, change: str) -> None:
    lossy = kinds[kind].find_lossy_text()
    assert lossy is not None
    assert change.replace(r"\u2581", "\u2581") in lossy


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_text_never_encodes_to_the_end_of_document_token(kinds: Kinds, kind: str) -> None:
    tokenizer = kinds[kind]
    eos = tokenizer.eos_token
    for text in (eos, f"a{eos}", f"a {eos}b", eos * 3, f"{eos} {eos}"):
        assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]) == "ab"
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([tokenizer.eos_id]) == tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_every_id_has_a_piece_and_a_number_of_bytes(kinds: Kinds, kind: str, speeches: list[str]) -> None:
    tokenizer = kinds[kind]
    assert len(tokenizer.pieces) == len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert max(map(max, tokenizer.encode_batch(speeches, threads=2))) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece"])
def test_token_bytes_of_lossy_tokenizers_count_the_text_that_remains(
    kinds: Kinds, kind: str, speeches: list[str]
) -> None:
    for text in speeches[:5]:
        tokens = kinds[kind].encode(text)
        decoded = kinds[kind].decode(tokens)
        assert 0 <= kinds[kind].token_bytes[tokens].sum() - len(decoded.encode()) <= (1 if kind == "metaspace" else 40)


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_a_file_is_read_by_the_class_of_its_format(kinds: Kinds, kind: str, tmp_path: Path) -> None:
    tokenizer = kinds[kind]
    (tmp_path / tokenizer.file_name).write_bytes(tokenizer.content)
    for again in (
        Tokenizer.from_bytes(tokenizer.content),
        Tokenizer.load(tmp_path / tokenizer.file_name),
        Tokenizer.from_folder(tmp_path),
        import_tokenizer(tmp_path),
    ):
        assert (type(again), again.sha256, again.eos_id) == (type(tokenizer), tokenizer.sha256, tokenizer.eos_id)


def test_a_folder_must_hold_one_tokenizer_file(kinds: Kinds, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    for kind in ("mistral", "gpt2"):
        (tmp_path / kinds[kind].file_name).write_bytes(kinds[kind].content)
    with pytest.raises(UserError, match=r"has both tokenizer\.json and tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def refuse(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        Tokenizer.load(path)


def test_files_that_are_not_tokenizers_are_refused(speeches: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.model is no file"):
        Tokenizer.load(tmp_path / "missing.model")
    junk = tmp_path / "junk"
    refuse(
        junk,
        np.arange(100, dtype=np.uint8).tobytes(),
        "junk: it is not a tokenizer: neither a SentencePiece model nor a tokenizer.json",
    )
    refuse(junk, b"\n" + bytes(100), "not a SentencePiece model")
    refuse(junk, b"", "it is not a tokenizer")
    refuse(junk, b'{"a": 1}', "not a tokenizer.json")
    refuse(
        junk, tokenizer_kinds.sentencepiece_model(speeches, vocab_size=400, eos_id=-1), "has no end-of-document token"
    )
    refuse(
        junk,
        tokenizer_kinds.byte_level(speeches, ["<s>", "</s>"]).to_str().encode(),
        "use `tostlm tokenizer import` on it",
    )


def test_sentencepiece_tokenizers_encode_like_the_package(kinds: Kinds, speeches: list[str]) -> None:
    """Except for U+2581, which SentencePiece reads as a space."""
    for kind in ("trained", "mistral", "spm default"):
        tokenizer = kinds[kind]
        assert isinstance(tokenizer, SentencePieceTokenizer)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
        texts = [*speeches, *(text for text in HARD_TEXTS if "\u2581" not in text)]
        assert tokenizer.encode_batch(texts, threads=2) == theirs.encode(texts)
    assert kinds["trained"].encode("1789") == [kinds["trained"].encode(digit)[0] for digit in "1789"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_fast_tokenizers_encode_like_the_package(kinds: Kinds, kind: str, speeches: list[str]) -> None:
    tokenizer = kinds[kind]
    assert isinstance(tokenizer, FastTokenizer)
    theirs = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    for text in [*speeches, *HARD_TEXTS[:7], *HARD_TEXTS[8:]]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text).ids == [*tokenizer.encode(text), tokenizer.eos_id]
    assert json.loads(tokenizer.content)["truncation"] is None
