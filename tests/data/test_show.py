"""The description of a prepared folder agrees with its content."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import fail, succeed, tostlm
from tostlm.data import (
    TRAIN,
    VALIDATION,
    PreparationSettings,
    Tokenizer,
    TokenSet,
    load_tokenizer,
    prepare,
    read_manifest,
    show,
)
from tostlm.data.show import CHARACTERS, Lengths, count_lengths
from tostlm.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def lengths_of(folder: Path, split: str) -> np.ndarray:
    return np.diff(TokenSet(folder, split).document_bounds)[:, 0]


@pytest.fixture(scope="module")
def shards(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speeches in many shards."""
    out = tmp_path_factory.mktemp("shards") / "prepared"
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2, shard_tokens=7000), tokenizer, out)
    return out


def test_the_command_says_what_the_folder_holds(shards: Path, tmp_path: Path) -> None:
    printed = succeed(tostlm("data", "show", str(shards), "--samples", "2", "--out", str(tmp_path / "x.png")))
    manifest = read_manifest(shards)
    assert manifest.tokenizer_sha256 in printed
    assert f"source {manifest.sources[0]}" in printed
    for name, split in manifest.splits.items():
        lengths = lengths_of(shards, name)
        p50, p90, p99 = (int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 90, 99))
        assert (
            f"{name}: {split.tokens:,} tokens of {split.documents:,} documents; shards: {len(split.shards)}; "
            in printed
        )
        assert f"text: {split.text_bytes:,} bytes, {split.text_bytes / split.tokens:.3f} a token" in printed
        facts = f"mean {lengths.mean():,.1f}, median {p50:,}, p90 {p90:,}, p99 {p99:,}, longest {lengths.max():,}"
        assert facts in printed
        assert len(re.findall(rf"^{name} document", printed, re.MULTILINE)) == 2
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert not (shards / "lengths.png").exists()


def test_the_drawing_is_beside_the_shards(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    assert f"drawn in {copy / 'lengths.png'}" in succeed(tostlm("data", "show", str(copy)))
    assert (copy / "lengths.png").read_bytes().startswith(PNG)
    assert "8 files match" in succeed(tostlm("data", "verify", str(copy)))


def test_samples_are_documents_chosen_by_the_seed(shards: Path, speeches: list[str], tmp_path: Path) -> None:
    def samples(count: int, seed: int) -> list[str]:
        paragraphs = show(shards, count, seed, tmp_path / "x.png")
        return [paragraph for paragraph in paragraphs if paragraph.startswith(f"{TRAIN} document")]

    assert samples(3, 5) == samples(3, 5) != samples(3, 6)
    assert samples(0, 5) == []
    every = samples(1000, 0)
    tokens, tokenizer = TokenSet(shards, TRAIN), load_tokenizer(shards)
    assert len(every) == tokens.split.documents
    for number, (paragraph, (start, stop)) in enumerate(zip(every, tokens.document_bounds.tolist(), strict=True)):
        heading, text = paragraph.split("\n", 1)
        assert heading == f"train document {number}, {stop - start:,} tokens:"
        whole = tokenizer.decode(tokens.read(start, stop - 1).tolist())
        assert whole in speeches
        assert [line.strip() for line in text.split("\n")] == [line.strip() for line in whole[:CHARACTERS].split("\n")]


def test_text_cannot_steer_the_terminal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\x1b[2Jfour-byte \U0001f642" + "\U0001f642" * 400}))
    prepare(PreparationSettings(sources=(str(tmp_path / "a.jsonl"),), heldout_fraction=0), tokenizer, tmp_path / "out")
    printed = "\n".join(show(tmp_path / "out", 1, 0, tmp_path / "x.png"))
    assert "    \\x1b[2Jfour-byte \U0001f642" in printed
    assert printed.count("\U0001f642") == CHARACTERS - len("\x1b[2Jfour-byte ")
    assert "\x1b" not in printed
    assert "heldout: no documents" in printed


@given(st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=50), min_size=1, max_size=4))
def test_lengths_are_exact_over_all_shards(shards: list[list[int]]) -> None:
    """Against numpy over all lengths at once."""
    lengths = np.array([length for shard in shards for length in shard])
    bounds = [np.cumsum([[0, *shard[:-1]], shard], axis=1).T for shard in shards]
    found = count_lengths(bounds)
    values, counts = np.unique(lengths, return_counts=True)
    assert np.array_equal(found.tokens, values)
    assert np.array_equal(found.documents, counts)
    for percent in (1, 50, 90, 99, 100):
        assert found.percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")
    powers = found.by_powers_of_two()
    edges = [1 << k for k in [*powers, max(powers) + 1]]
    assert [*powers.values()] == np.histogram(lengths, edges)[0].tolist()
    assert sum(powers.values()) == len(lengths)


def test_powers_of_two_hold_their_first_number() -> None:
    lengths = Lengths(np.array([7, 8, 2**40 - 1, 2**40]), np.array([1, 2, 3, 4]))
    powers = {k: count for k, count in lengths.by_powers_of_two().items() if count}
    assert powers == {2: 1, 3: 2, 39: 3, 40: 4}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-8], "bytes, its manifest says"),
        (lambda content: content[:-8] + b"\0" * 8, "document ends do not ascend"),
        (lambda content: content[8:16] * 2 + content[16:], "document ends do not ascend"),
        (lambda content: b"\xff" * 8 + content[8:], "document ends do not ascend"),
    ],
)
def test_damaged_document_ends(shards: Path, tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    path = copy / "train-00001.ends"
    path.write_bytes(damage(path.read_bytes()))
    fail(tostlm("data", "show", str(copy)), "train-00001.ends", words)


def test_without_matplotlib_statistics_come_first(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    printed = []
    with pytest.raises(UserError, match=r"pip install 'tostlm\[eval\]'"):
        for paragraph in show(data, 1, 0, tmp_path / "x.png"):
            printed.append(paragraph)
    assert [paragraph.split(":")[0] for paragraph in printed if " tokens of " in paragraph] == [TRAIN, VALIDATION]
    assert not (tmp_path / "x.png").exists()


def test_what_cannot_be_shown(data: Path, tmp_path: Path) -> None:
    fail(tostlm("data", "show", str(tmp_path)), "holds no prepared data")
    fail(tostlm("data", "show", str(data), "--out", str(tmp_path)), "is a folder; name a file in it")
