"""The order of samples is a pure function: no sample twice or missing, whoever reads it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tostlm.data import TRAIN, Loader, TokenSet
from tostlm.data.loader import permuted
from tostlm.errors import UserError


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_a_permutation_of_any_size(size: int, key: str) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_shuffles() -> None:
    order = [permuted(index, 10_000, "0/0") for index in range(10_000)]
    other = [permuted(index, 10_000, "0/1") for index in range(10_000)]
    assert abs(np.corrcoef(order, range(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.05
    assert permuted(0, 10**11, "seek") == permuted(0, 10**11, "seek") < 10**11


def test_an_epoch_reads_every_window_once(data: Path) -> None:
    tokens = TokenSet(data, TRAIN)
    loader = Loader(tokens, context=64, sequences=1, seed=3)
    rows = np.concatenate([loader.batch(step, 0, 1)[0] for step in range(loader.windows)])
    windows = tokens.tokens(0, loader.windows * 64).reshape(-1, 64)
    assert not np.array_equal(rows, windows)
    assert np.array_equal(rows[np.lexsort(rows.T)], windows[np.lexsort(windows.T)])


def test_targets_are_the_next_tokens(data: Path) -> None:
    inputs, targets = Loader(TokenSet(data, TRAIN), 64, 8, seed=0).batch(5, 0, 1)
    assert inputs.shape == targets.shape == (8, 64)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_number_of_ranks_shares_the_same_samples(data: Path, world: int) -> None:
    loader = Loader(TokenSet(data, TRAIN), 64, sequences=8, seed=0)
    for step in (0, 7, 1000):
        shares = [loader.batch(step, rank, world)[0] for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), loader.batch(step, 0, 1)[0])


def test_seeds_and_epochs_differ(data: Path) -> None:
    tokens = TokenSet(data, TRAIN)
    first = Loader(tokens, 64, 8, seed=0)
    assert np.array_equal(first.batch(3, 0, 1)[0], Loader(tokens, 64, 8, seed=0).batch(3, 0, 1)[0])
    assert not np.array_equal(first.batch(3, 0, 1)[0], Loader(tokens, 64, 8, seed=1).batch(3, 0, 1)[0])
    one = Loader(tokens, 64, 1, seed=0)
    assert not np.array_equal(one.batch(0, 0, 1)[0], one.batch(one.windows, 0, 1)[0])


def test_too_few_tokens(data: Path) -> None:
    with pytest.raises(UserError, match="fewer than one window of 10000000"):
        Loader(TokenSet(data, TRAIN), 10_000_000, 1, 0)
