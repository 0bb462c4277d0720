"""What holds for tokenizers of every kind: nothing is lost where none is said to be, and the end is never text."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tokenizers import tokenizer_kinds
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.data.tokenizers.fast import FastTokenizer
from tostlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tostlm.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TRAPS = [
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
LOSSLESS = ["trained here", "mistral", "gpt2", "byte-level"]
LOSSY = ["metaspace", "spm default", "wordpiece", "unigram"]


@pytest.fixture(scope="module")
def every(tokenizer: Tokenizer, speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    folder = tmp_path_factory.mktemp("kinds")

    def imported(content: bytes) -> Tokenizer:
        (folder / "source").write_bytes(content)
        return import_tokenizer(folder / "source")

    return {
        "trained here": tokenizer,
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
@given(text=TEXTS | st.sampled_from(TRAPS))
def test_nothing_is_lost(every: Kinds, kind: str, text: str) -> None:
    tokenizer = every[kind]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_id not in tokens
    added = 1 if kind == "mistral" and text else 0  # its space before every text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode()) + added


@pytest.mark.parametrize("kind", LOSSLESS)
def test_real_text(every: Kinds, kind: str, speeches: list[str]) -> None:
    tokenizer = every[kind]
    batch = tokenizer.encode_batch(speeches, threads=2)
    assert [tokenizer.decode(tokens) for tokens in batch] == speeches
    assert batch == [tokenizer.encode(text) for text in speeches] == tokenizer.encode_batch(speeches, threads=1)
    assert sum(map(len, batch)) < sum(len(text) for text in speeches) / 2  # it compresses


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_is_said(every: Kinds, kind: str) -> None:
    assert every[kind].loss() is None


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("metaspace", r"changes '\u2581 a \u2581b' into"),  # spelled out, SentencePiece's space is a space there
        ("spm default", r"changes ' one space first' into 'one space first'"),
        ("wordpiece", r"changes ' one space first' into 'one space first'"),
        ("unigram", r"changes ' one space first' into 'one space first'"),
    ],
)
def test_loss_is_said(every: Kinds, kind: str, change: str) -> None:
    loss = every[kind].loss()
    assert loss is not None
    assert change.replace(r"\u2581", "\u2581") in loss


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_the_end_is_never_text(every: Kinds, kind: str) -> None:
    tokenizer = every[kind]
    end = tokenizer.end_piece
    for text in (end, f"a{end}", f"a {end}b", end * 3, f"{end} {end}"):
        assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]) == "ab"
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([tokenizer.eos_id]) == tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_pieces_are_the_vocabulary(every: Kinds, kind: str, speeches: list[str]) -> None:
    tokenizer = every[kind]
    assert len(tokenizer.pieces()) == len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert max(map(max, tokenizer.encode_batch(speeches, threads=2))) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece"])
def test_bytes_of_tokens_are_those_of_the_text_they_keep(every: Kinds, kind: str, speeches: list[str]) -> None:
    for text in speeches[:5]:
        tokens = every[kind].encode(text)
        written = every[kind].decode(tokens)
        assert 0 <= every[kind].token_bytes[tokens].sum() - len(written.encode()) <= (1 if kind == "metaspace" else 40)


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_a_file_is_read_as_what_it_is(every: Kinds, kind: str, tmp_path: Path) -> None:
    tokenizer = every[kind]
    (tmp_path / tokenizer.file_name).write_bytes(tokenizer.content)
    for again in (
        Tokenizer.from_bytes(tokenizer.content),
        Tokenizer.load(tmp_path / tokenizer.file_name),
        Tokenizer.of_folder(tmp_path),
        import_tokenizer(tmp_path),
    ):
        assert (type(again), again.sha256, again.eos_id) == (type(tokenizer), tokenizer.sha256, tokenizer.eos_id)


def test_a_folder_holds_one(every: Kinds, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.model or tokenizer\.json"):
        Tokenizer.of_folder(tmp_path)
    for kind in ("mistral", "gpt2"):
        (tmp_path / every[kind].file_name).write_bytes(every[kind].content)
    with pytest.raises(UserError, match=r"has both tokenizer\.model and tokenizer\.json"):
        Tokenizer.of_folder(tmp_path)


def refuse(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        Tokenizer.load(path)


def test_not_a_tokenizer(speeches: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.model is no file"):
        Tokenizer.load(tmp_path / "missing.model")
    junk = tmp_path / "junk"
    refuse(junk, np.arange(100, dtype=np.uint8).tobytes(), "junk: not a SentencePiece model")
    refuse(junk, b"", "not a SentencePiece model")
    refuse(junk, b'{"a": 1}', "not a tokenizer.json")
    refuse(junk, tokenizer_kinds.sentencepiece_model(speeches, vocab_size=400, eos_id=-1), "has no document end")
    refuse(
        junk,
        tokenizer_kinds.byte_level(speeches, ["<s>", "</s>"]).to_str().encode(),
        "use `tostlm tokenizer import` on it",
    )


def test_of_sentencepiece(every: Kinds, speeches: list[str]) -> None:
    """The ids are SentencePiece's own, but for U+2581, which it takes for a space."""
    import sentencepiece

    for kind in ("trained here", "mistral", "spm default"):
        tokenizer = every[kind]
        assert isinstance(tokenizer, SentencePieceTokenizer)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
        texts = [*speeches, *(trap for trap in TRAPS if "\u2581" not in trap)]
        assert tokenizer.encode_batch(texts, threads=2) == theirs.encode(texts)
    assert every["trained here"].encode("1789") == [every["trained here"].encode(digit)[0] for digit in "1789"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_of_hugging_face(every: Kinds, kind: str, speeches: list[str]) -> None:
    """The ids are the package's own without special tokens."""
    import tokenizers

    tokenizer = every[kind]
    assert isinstance(tokenizer, FastTokenizer)
    theirs = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    for text in [*speeches, *TRAPS[:7], *TRAPS[8:]]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text).ids == [*tokenizer.encode(text), tokenizer.eos_id]
    assert json.loads(tokenizer.content)["truncation"] is None
