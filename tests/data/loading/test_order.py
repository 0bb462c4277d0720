"""Permutations and blends are exact, at any size."""

import hashlib
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tostlm.data.loading.order import LONGEST_CYCLE, ROUNDS, Blend, permuted

HUGE = 10**11


@settings(max_examples=60)
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_a_permutation_of_any_size(size: int, key: str) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_shuffles() -> None:
    order = [permuted(index, 10_000, "0/0") for index in range(10_000)]
    other = [permuted(index, 10_000, "0/1") for index in range(10_000)]
    assert abs(np.corrcoef(order, range(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.05


def unpermuted(value: int, size: int, key: str) -> int:
    """The inverse of `permuted`, the network run backwards."""
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for round_ in reversed(range(ROUNDS)):
            digest = hashlib.blake2b(f"{key}/{round_}/{left}".encode(), digest_size=8).digest()
            left, right = right ^ (int.from_bytes(digest, "little") & mask), left
        value = (left << half_bits) | right
        if value < size:
            return value


@pytest.mark.parametrize("size", [HUGE, 2**36, 2**36 + 1])
def test_a_permutation_of_any_size_has_an_inverse(size: int) -> None:
    numbers = random.Random(0)
    for index in [0, 1, size - 1, *(numbers.randrange(size) for _ in range(2000))]:
        value = permuted(index, size, "7/0/3")
        assert 0 <= value < size
        assert unpermuted(value, size, "7/0/3") == index
        assert permuted(unpermuted(index, size, "7/0/3"), size, "7/0/3") == index


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], [1]),
        ([7, 3], [7, 3]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.5, 1 / 3, 1 / 6], [500_000, 333_333, 166_667]),  # not thirds and sixths as they are written
        ([1e-05, 1], [1, 100_000]),
        ([1.5, 4.5, 3], [1, 3, 2]),
        ([1e-9, 1], [0, LONGEST_CYCLE]),
    ],
)
def test_the_cycle_of_some_weights(weights: list[float], counts: list[int]) -> None:
    blend = Blend(weights)
    assert blend.counts == counts
    assert blend.length == sum(counts)


@settings(max_examples=100)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_rounding_leaves_less_than_a_sample_in_a_cycle(weights: list[float]) -> None:
    blend = Blend(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert sum(blend.counts) == blend.length <= LONGEST_CYCLE
    for weight, count in zip(weights, blend.counts, strict=True):
        assert abs(count - Fraction(str(weight)) / total * blend.length) < 1


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1 / 3, 2 / 3], [5, 1, 1, 30], [2.5]])
def test_every_cycle_has_its_counts_and_no_sample_twice(weights: list[float]) -> None:
    blend = Blend(weights)
    picked = [blend.pick(sample, "key") for sample in range(6 * blend.length)]
    for cycle in range(6):
        part = Counter(chosen for chosen, _ in picked[cycle * blend.length : (cycle + 1) * blend.length])
        assert [part[chosen] for chosen in range(len(weights))] == blend.counts
    for chosen, count in enumerate(blend.counts):
        assert sorted(index for which, index in picked if which == chosen) == list(range(6 * count))


def test_the_order_of_cycles_differs() -> None:
    blend = Blend([0.5, 0.3, 0.2])
    cycles = {tuple(blend.pick(cycle * 10 + place, "k")[0] for place in range(10)) for cycle in range(20)}
    assert len(cycles) > 15


def test_the_longest_cycle_is_exact_too() -> None:
    blend = Blend([0.5, 1 / 3, 1 / 6])
    start = 10**8 * blend.length
    picked = Counter(blend.pick(start + place, "k")[0] for place in range(0, blend.length, 1000))
    assert picked[0] == pytest.approx(500, abs=60)
    assert {blend.pick(start + place, "k")[1] // blend.counts[0] for place in range(50)} >= {10**8}
