"""Imported tokenizers keep their ids, and their end-of-document token becomes part of their file and identity."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, fail, succeed, tostlm
from tests.data.tokenizers import tokenizer_kinds
from tests.data.tokenizers.test_tokenizers import HARD_TEXTS, TEXTS
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.errors import UserError
from tostlm.files import sha256_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "gpt2.tiktoken"
    path.write_bytes(tokenizer_kinds.ranks_file(tokenizer_kinds.gpt2_ranks()))
    r50k_base_sha256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert sha256_of(path) == r50k_base_sha256
    return path


@pytest.fixture(scope="module")
def gpt2(ranks: Path) -> Tokenizer:
    return import_tokenizer(ranks)


@pytest.fixture(scope="module")
def tiktoken_gpt2() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "gpt2",
        pat_str=tokenizer_kinds.GPT2_PATTERN,
        mergeable_ranks=tokenizer_kinds.gpt2_ranks(),
        special_tokens={"<|endoftext|>": 50256},
    )


@settings(max_examples=500)
@given(text=TEXTS | st.text(st.sampled_from(" \n\t'sdmtlvreSD\u0301a1.-\u00a0\u2003"), max_size=40))
def test_gpt2_encodes_like_tiktoken(gpt2: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, text: str) -> None:
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


def test_gpt2_encodes_real_text_and_every_character_like_tiktoken(
    gpt2: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, speeches: list[str]
) -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    blocks = [" a".join(characters[start : start + 997]) for start in range(0, len(characters), 997)]
    texts = [*speeches, *HARD_TEXTS, *blocks]
    assert gpt2.encode_batch(texts, threads=2) == tiktoken_gpt2.encode_ordinary_batch(texts, num_threads=2)
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.eos_token) == (50257, 50256, "<|endoftext|>")


def test_the_gpt2_recipe_makes_the_file_with_the_documented_hash(gpt2: Tokenizer, ranks: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    recipe = ["sh", str(ROOT / "tokenizer" / "gpt2.sh"), str(ranks), str(tmp_path / "gpt2.json")]
    subprocess.run(recipe, check=True, capture_output=True, env={**os.environ, "PATH": path})
    assert (tmp_path / "gpt2.json").read_bytes() == gpt2.content
    assert f"`{gpt2.sha256}`" in (ROOT / "tokenizer" / "README.md").read_text()


def test_ranks_that_are_not_gpt2s_are_refused(ranks: Path, tmp_path: Path) -> None:
    lines = ranks.read_bytes().splitlines(keepends=True)
    for content, words in [
        (b"".join(lines[:1000]), "holds 1,000 ranks up to 999; of tiktoken's files only GPT-2's, 50,256 ranks"),
        (b"".join(lines[:-1]) + b"!!!! 50255\n", "the ranks file is damaged"),
        (b"".join(lines).replace(b"IHQ= 256\n", b"//4= 256\n"), "no lower ranks lead to"),
    ]:
        (tmp_path / "ranks").write_bytes(content)
        with pytest.raises(UserError, match=words):
            import_tokenizer(tmp_path / "ranks")


def write(folder: Path, content: dict[str, Any], config: object = None) -> Path:
    """Write a tokenizer.json and, if given, a tokenizer_config.json; return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama(speeches: list[str]) -> dict[str, Any]:
    """A tokenizer.json that puts <s> before a text, truncates and pads."""
    fast = tokenizer_kinds.byte_level(speeches, ["<s>", "<eos>", "</s>"])
    fast.enable_truncation(8)
    fast.enable_padding(length=32, pad_token="<s>")
    content: dict[str, Any] = json.loads(fast.to_str())
    return content


def test_the_end_of_document_token_is_found(llama: dict[str, Any], tmp_path: Path) -> None:
    def eos_token(source: Path, named: str | None = None) -> str:
        return import_tokenizer(source, named).eos_token

    assert eos_token(write(tmp_path / "usual", llama)) == "</s>"
    assert eos_token(write(tmp_path / "name", llama, {"eos_token": "<eos>"})) == "<eos>"
    assert eos_token(write(tmp_path / "entry", llama, {"eos_token": {"content": "<eos>", "lstrip": False}})) == "<eos>"
    assert eos_token(write(tmp_path / "none", llama, {"eos_token": None})) == "</s>"
    assert eos_token(tmp_path / "name" / "tokenizer.json", "</s>") == "</s>"
    template = {**llama["post_processor"], "single": llama["post_processor"]["single"][::-1]}
    appending = llama | {"post_processor": template, "padding": None, "truncation": None}
    assert eos_token(write(tmp_path / "own", appending, {"eos_token": "</s>"})) == "<s>"


def test_an_ordinary_word_can_become_the_end_of_document_token(llama: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = import_tokenizer(write(tmp_path / "t", llama), "\u00e9t\u00e9")
    assert tokenizer.decode(tokenizer.encode("l'\u00e9t\u00e9")) == "l'\u00e9t\u00e9"
    assert tokenizer.eos_id not in tokenizer.encode("l'\u00e9t\u00e9")


def test_an_imported_tokenizer_neither_truncates_nor_pads(
    llama: dict[str, Any], tmp_path: Path, speeches: list[str]
) -> None:
    tokenizer = import_tokenizer(write(tmp_path / "t", llama))
    assert tokenizer.decode(tokenizer.encode(speeches[0])) == speeches[0]
    assert len(tokenizer.encode("a")) == 1


def test_the_end_of_document_token_is_part_of_the_identity(llama: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "t", llama)
    one, other = import_tokenizer(source, "<eos>"), import_tokenizer(source, "</s>")
    assert one.sha256 != other.sha256
    (tmp_path / "again.json").write_bytes(one.content)
    assert import_tokenizer(tmp_path / "again.json").sha256 == one.sha256


def test_what_cannot_be_imported_is_refused_with_the_reason(
    llama: dict[str, Any], tmp_path: Path, speeches: list[str]
) -> None:
    def refused(source: Path, words: str, eos_token: str | None = None) -> None:
        with pytest.raises(UserError, match=words):
            import_tokenizer(source, eos_token)

    refused(tmp_path / "x", "is no file")
    refused(tmp_path, r"has no tokenizer\.json or tokenizer\.model")
    refused(write(tmp_path / "t", llama), "has no token '<end>'; name one that it has", "<end>")
    refused(write(tmp_path / "c", llama, ["no object"]), "is no JSON object")
    refused(write(tmp_path / "n", llama, {"eos_token": "<nope>"}), "has no token '<nope>'")
    plain = json.loads(tokenizer_kinds.byte_level(speeches, ["<s>"]).to_str())
    refused(write(tmp_path / "p", plain), "none of the common end-of-document tokens")
    (tmp_path / "m.model").write_bytes(tokenizer_kinds.mistral_like(speeches))
    refused(tmp_path / "m.model", "--eos-token <eos> is not the model's end-of-document token, </s>", "<eos>")
    assert import_tokenizer(tmp_path / "m.model", "</s>").eos_token == "</s>"


def test_the_import_command_reports_loss_and_refuses_it_by_default(
    ranks: Path, gpt2: Tokenizer, tmp_path: Path, speeches: list[str]
) -> None:
    out = tmp_path / "gpt2.json"
    printed = succeed(tostlm("tokenizer", "import", str(ranks), "--out", str(out)))
    assert f"50,257 pieces, sha256 {gpt2.sha256}, end-of-document token <|endoftext|>, lossless" in printed
    assert out.read_bytes() == gpt2.content
    lossy = tmp_path / "lossy.model"
    lossy.write_bytes(tokenizer_kinds.sentencepiece_model(speeches, vocab_size=400))
    command = ["tokenizer", "import", str(lossy), "--out", str(tmp_path / "lossy.out")]
    fail(tostlm(*command), "loses text: it changes ' one space first' into 'one space first'", "--allow-lossy")
    assert not (tmp_path / "lossy.out").exists()
    assert "lossy: it changes" in succeed(tostlm(*command, "--allow-lossy"))
    assert (tmp_path / "lossy.out").read_bytes() == lossy.read_bytes()
    fail(tostlm("tokenizer", "import", str(ranks), "--out", str(tmp_path)), "is a folder; name a file in it")
