"""A tokenizer is trained on a uniform sample that documents and seed decide, in bounded memory."""

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tostlm.data import Tokenizer, first_bytes, train_tokenizer
from tostlm.data.tokenizers.training import sample
from tostlm.errors import UserError


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_training_is_reproducible_in_any_order(speeches: list[str], tmp_path: Path) -> None:
    budget = size(speeches) // 2
    orders = [speeches, speeches[::-1], sorted(speeches)]
    models = {train_tokenizer(texts, 400, tmp_path / "t.model", budget).sha256 for texts in orders}
    assert models == {Tokenizer.load(tmp_path / "t.model").sha256}
    assert train_tokenizer(speeches, 400, tmp_path / "other.model", budget, seed=1).sha256 not in models


def test_a_trained_tokenizer_knows_the_end(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_id, tokenizer.end_piece) == (1, "<|endoftext|>")


DOCUMENTS = [f"document {number} ".encode() * (1 + number % 7) for number in range(1000)]


@pytest.mark.parametrize("limit", [1, 100, 5_000, 20_000, 10**9])
def test_the_sample_is_the_documents_that_fit_whatever_their_order(limit: int) -> None:
    texts = [document.decode() for document in DOCUMENTS]
    expected = sample(texts, limit, 0)
    assert sum(map(len, expected)) <= limit
    for seed in range(20):
        random.Random(seed).shuffle(texts)
        assert sample(texts, limit, 0) == expected
    if limit == 10**9:
        assert sorted(expected) == sorted(DOCUMENTS)
    elif limit > 100:
        assert sum(map(len, expected)) > limit - max(map(len, DOCUMENTS))
        assert sample(texts, limit, 1) != expected


def test_a_part_of_the_budget_is_a_part_of_the_sample() -> None:
    texts = [document.decode() for document in DOCUMENTS]
    small, large = sample(texts, 4_000, 3), sample(texts, 8_000, 3)
    assert small == large[: len(small)]


def test_the_same_document_many_times() -> None:
    texts = [*["again " * 10] * 50, *(document.decode() for document in DOCUMENTS[:50])]
    expected = sample(texts, 2_000, 0)
    for seed in range(50):
        random.Random(seed).shuffle(texts)
        assert sample(texts, 2_000, 0) == expected


def test_every_document_is_as_likely() -> None:
    texts = [f"{number:04d}" for number in range(100)]
    counts = dict.fromkeys(texts, 0)
    for seed in range(2000):
        for document in sample(texts, 80, seed):
            counts[document.decode()] += 1
    assert sum(counts.values()) == 2000 * 20
    assert max(abs(count - 400) for count in counts.values()) < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_a_document_longer_than_the_budget_is_cut() -> None:
    assert sample(["\u00e9" * 100], 5, 0) == ["\u00e9\u00e9".encode()]


def test_memory_is_bounded_by_the_sample() -> None:
    stream = (f"{number} " * 100 for number in range(50_000))  # about 28 MB
    tracemalloc.start()
    kept = sample(stream, 1_000_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 900_000 < sum(map(len, kept)) <= 1_000_000
    assert peak < 3_000_000


def test_reading_stops_where_it_is_told() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "abc\u00e9"

    assert list(first_bytes(endless(), 11)) == ["abc\u00e9"] * 3
    assert list(first_bytes(endless(), 10)) == ["abc\u00e9"] * 2


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
