"""Tokenizers made elsewhere keep their ids, and their document end becomes part of what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, fail, succeed, tostlm
from tests.data.tokenizers import tokenizer_kinds
from tests.data.tokenizers.test_tokenizers import TEXTS, TRAPS
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.errors import UserError
from tostlm.files import sha256_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "gpt2.tiktoken"
    path.write_bytes(tokenizer_kinds.ranks_file(tokenizer_kinds.gpt2_ranks()))
    assert (
        sha256_of(path) == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    )  # of r50k_base.tiktoken
    return path


@pytest.fixture(scope="module")
def gpt2(ranks: Path) -> Tokenizer:
    return import_tokenizer(ranks)


@pytest.fixture(scope="module")
def peer() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "gpt2",
        pat_str=tokenizer_kinds.GPT2_PATTERN,
        mergeable_ranks=tokenizer_kinds.gpt2_ranks(),
        special_tokens={"<|endoftext|>": 50256},
    )


@settings(max_examples=500)
@given(text=TEXTS | st.text(st.sampled_from(" \n\t'sdmtlvreSD\u0301a1.-\u00a0\u2003"), max_size=40))
def test_gpt2_gives_the_ids_of_tiktoken(gpt2: Tokenizer, peer: tiktoken.Encoding, text: str) -> None:
    assert gpt2.encode(text) == peer.encode_ordinary(text)


def test_gpt2_on_real_text_and_every_character(gpt2: Tokenizer, peer: tiktoken.Encoding, speeches: list[str]) -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    blocks = [" a".join(characters[start : start + 997]) for start in range(0, len(characters), 997)]
    texts = [*speeches, *TRAPS, *blocks]
    assert gpt2.encode_batch(texts, threads=2) == peer.encode_ordinary_batch(texts, num_threads=2)
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.end_piece) == (50257, 50256, "<|endoftext|>")


def test_the_recipe_makes_the_recorded_file(gpt2: Tokenizer, ranks: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    recipe = ["sh", str(ROOT / "tokenizer" / "gpt2.sh"), str(ranks), str(tmp_path / "gpt2.json")]
    subprocess.run(recipe, check=True, capture_output=True, env={**os.environ, "PATH": path})
    assert (tmp_path / "gpt2.json").read_bytes() == gpt2.content
    assert f"`{gpt2.sha256}`" in (ROOT / "tokenizer" / "README.md").read_text()


def test_other_ranks(ranks: Path, tmp_path: Path) -> None:
    lines = ranks.read_bytes().splitlines(keepends=True)
    for content, words in [
        (b"".join(lines[:1000]), "holds 1,000 ranks up to 999; of tiktoken's files only GPT-2's is read"),
        (b"".join(lines[:-1]) + b"!!!! 50255\n", "the ranks file is damaged"),
        (b"".join(lines).replace(b"IHQ= 256\n", b"//4= 256\n"), "no lower ranks lead to"),
    ]:
        (tmp_path / "ranks").write_bytes(content)
        with pytest.raises(UserError, match=words):
            import_tokenizer(tmp_path / "ranks")


def write(folder: Path, content: dict, config: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama(speeches: list[str]) -> dict:
    fast = tokenizer_kinds.byte_level(speeches, ["<s>", "<eos>", "</s>"])
    fast.enable_truncation(8)
    fast.enable_padding(length=32, pad_token="<s>")
    return json.loads(fast.to_str())


def test_the_document_end_is_found(llama: dict, tmp_path: Path) -> None:
    def end(source: Path, named: str | None = None) -> str:
        return import_tokenizer(source, named).end_piece

    assert end(write(tmp_path / "usual", llama)) == "</s>"
    assert end(write(tmp_path / "name", llama, {"eos_token": "<eos>"})) == "<eos>"
    assert end(write(tmp_path / "entry", llama, {"eos_token": {"content": "<eos>", "lstrip": False}})) == "<eos>"
    assert end(write(tmp_path / "none", llama, {"eos_token": None})) == "</s>"
    assert end(tmp_path / "name" / "tokenizer.json", "</s>") == "</s>"
    template = {**llama["post_processor"], "single": llama["post_processor"]["single"][::-1]}
    appending = llama | {"post_processor": template, "padding": None, "truncation": None}
    assert end(write(tmp_path / "own", appending, {"eos_token": "</s>"})) == "<s>"


def test_a_word_can_become_the_document_end(llama: dict, tmp_path: Path) -> None:
    tokenizer = import_tokenizer(write(tmp_path / "t", llama), "\u00e9t\u00e9")
    assert tokenizer.decode(tokenizer.encode("l'\u00e9t\u00e9")) == "l'\u00e9t\u00e9"
    assert tokenizer.eos_id not in tokenizer.encode("l'\u00e9t\u00e9")


def test_an_imported_tokenizer_neither_cuts_nor_pads(llama: dict, tmp_path: Path, speeches: list[str]) -> None:
    tokenizer = import_tokenizer(write(tmp_path / "t", llama))
    assert tokenizer.decode(tokenizer.encode(speeches[0])) == speeches[0]
    assert len(tokenizer.encode("a")) == 1


def test_the_end_is_part_of_the_identity(llama: dict, tmp_path: Path) -> None:
    source = write(tmp_path / "t", llama)
    one, other = import_tokenizer(source, "<eos>"), import_tokenizer(source, "</s>")
    assert one.sha256 != other.sha256
    (tmp_path / "again.json").write_bytes(one.content)
    assert import_tokenizer(tmp_path / "again.json").sha256 == one.sha256


def test_mistakes(llama: dict, tmp_path: Path, speeches: list[str]) -> None:
    def refused(source: Path, words: str, end: str | None = None) -> None:
        with pytest.raises(UserError, match=words):
            import_tokenizer(source, end)

    refused(tmp_path / "x", "is no file")
    refused(tmp_path, r"has no tokenizer\.model or tokenizer\.json")
    refused(write(tmp_path / "t", llama), "has no token '<end>'; name one that it has", "<end>")
    refused(write(tmp_path / "c", llama, ["no object"]), "is no JSON object")
    refused(write(tmp_path / "n", llama, {"eos_token": "<nope>"}), "has no token '<nope>'")
    plain = json.loads(tokenizer_kinds.byte_level(speeches, ["<s>"]).to_str())
    refused(write(tmp_path / "p", plain), "none of the usual document ends")
    (tmp_path / "m.model").write_bytes(tokenizer_kinds.mistral_like(speeches))
    refused(tmp_path / "m.model", "--end-token <eos> is not the model's document end, </s>", "<eos>")
    assert import_tokenizer(tmp_path / "m.model", "</s>").end_piece == "</s>"


def test_the_command(ranks: Path, gpt2: Tokenizer, tmp_path: Path, speeches: list[str]) -> None:
    out = tmp_path / "gpt2.json"
    printed = succeed(tostlm("tokenizer", "import", str(ranks), "--out", str(out)))
    assert f"50,257 pieces, sha256 {gpt2.sha256}, document end <|endoftext|>, lossless" in printed
    assert out.read_bytes() == gpt2.content
    lossy = tmp_path / "lossy.model"
    lossy.write_bytes(tokenizer_kinds.sentencepiece_model(speeches, vocab_size=400))
    command = ["tokenizer", "import", str(lossy), "--out", str(tmp_path / "lossy.out")]
    fail(tostlm(*command), "loses text: it changes ' one space first' into 'one space first'", "--allow-loss")
    assert not (tmp_path / "lossy.out").exists()
    assert "lossy: it changes" in succeed(tostlm(*command, "--allow-loss"))
    assert (tmp_path / "lossy.out").read_bytes() == lossy.read_bytes()
    fail(tostlm("tokenizer", "import", str(ranks), "--out", str(tmp_path)), "is a folder; name a file in it")
