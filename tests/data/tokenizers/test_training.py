"""Tokenizer training: the sample depends on documents and seed alone, is uniform and needs bounded memory."""

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tostlm.data import Tokenizer, limit_bytes, train_tokenizer
from tostlm.data.tokenizers.training import sample_texts
from tostlm.errors import UserError


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_training_does_not_depend_on_the_order_of_documents(speeches: list[str], tmp_path: Path) -> None:
    budget = size(speeches) // 2
    orders = [speeches, speeches[::-1], sorted(speeches)]
    models = {train_tokenizer(texts, 400, tmp_path / "t.model", budget).sha256 for texts in orders}
    assert models == {Tokenizer.load(tmp_path / "t.model").sha256}
    assert train_tokenizer(speeches, 400, tmp_path / "other.model", budget, seed=1).sha256 not in models


def test_a_trained_tokenizer_has_endoftext_as_its_end_of_document_token(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_id, tokenizer.eos_token) == (1, "<|endoftext|>")


DOCUMENTS = [f"document {number} ".encode() * (1 + number % 7) for number in range(1000)]


@pytest.mark.parametrize("limit", [1, 100, 5_000, 20_000, 10**9])
def test_the_sample_fills_its_limit_and_does_not_depend_on_the_order_of_documents(limit: int) -> None:
    texts = [document.decode() for document in DOCUMENTS]
    expected = sample_texts(texts, limit, 0)
    assert sum(map(len, expected)) <= limit
    for seed in range(20):
        random.Random(seed).shuffle(texts)
        assert sample_texts(texts, limit, 0) == expected
    if limit == 10**9:
        assert sorted(expected) == sorted(DOCUMENTS)
    elif limit > 100:
        assert sum(map(len, expected)) > limit - max(map(len, DOCUMENTS))
        assert sample_texts(texts, limit, 1) != expected


def test_a_smaller_sample_is_the_start_of_a_larger_one_texts() -> None:
    texts = [document.decode() for document in DOCUMENTS]
    small, large = sample_texts(texts, 4_000, 3), sample_texts(texts, 8_000, 3)
    assert small == large[: len(small)]


def test_repeated_documents_do_not_make_the_sample_depend_on_the_order() -> None:
    texts = [*["again " * 10] * 50, *(document.decode() for document in DOCUMENTS[:50])]
    expected = sample_texts(texts, 2_000, 0)
    for seed in range(50):
        random.Random(seed).shuffle(texts)
        assert sample_texts(texts, 2_000, 0) == expected


def test_every_document_is_sampled_with_equal_probability() -> None:
    texts = [f"{number:04d}" for number in range(100)]
    counts = dict.fromkeys(texts, 0)
    for seed in range(2000):
        for document in sample_texts(texts, 80, seed):
            counts[document.decode()] += 1
    assert sum(counts.values()) == 2000 * 20
    assert max(abs(count - 400) for count in counts.values()) < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_a_document_longer_than_the_limit_is_cut_between_characters() -> None:
    assert sample_texts(["\u00e9" * 100], 5, 0) == ["\u00e9\u00e9".encode()]


def test_memory_is_bounded_by_the_size_of_the_sample_texts() -> None:
    stream = (f"{number} " * 100 for number in range(50_000))  # about 28 MB
    tracemalloc.start()
    kept = sample_texts(stream, 1_000_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 900_000 < sum(map(len, kept)) <= 1_000_000
    assert peak < 3_000_000


def test_limit_bytes_stops_reading_at_the_limit() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "abc\u00e9"

    assert list(limit_bytes(endless(), 11)) == ["abc\u00e9"] * 3
    assert list(limit_bytes(endless(), 10)) == ["abc\u00e9"] * 2


def test_a_failed_training_writes_no_file_and_reports_the_cause(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "a line\n" * 100
        raise ValueError("broken source")

    with pytest.raises(UserError, match="vocab_size 5000 does not fit this text"):
        train_tokenizer(["a few words"], 5000, tmp_path / "t.model")
    with pytest.raises(UserError, match="256 bytes, 2 special tokens"):
        train_tokenizer(["a few words"], 258, tmp_path / "t.model")
    with pytest.raises(ValueError, match="broken source"):
        train_tokenizer(broken(), 400, tmp_path / "t.model")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()
