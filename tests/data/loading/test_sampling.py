"""Permutations and blends of samples are exact, at any size."""

import hashlib
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tostlm.data.loading.sampling import FEISTEL_ROUNDS, MAX_CYCLE, Blend, permute

HUGE = 10**11


@settings(max_examples=60)
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_permute_is_a_permutation_of_any_size(size: int, key: str) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_look_random_and_differ_by_key() -> None:
    order = [permute(index, 10_000, "0/0") for index in range(10_000)]
    other = [permute(index, 10_000, "0/1") for index in range(10_000)]
    assert abs(np.corrcoef(order, range(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.05


def inverse_permute(value: int, size: int, key: str) -> int:
    """Return the index at which `permute` returns `value`, by the Feistel network run backwards."""
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for round_ in reversed(range(FEISTEL_ROUNDS)):
            digest = hashlib.blake2b(f"{key}/{round_}/{left}".encode(), digest_size=8).digest()
            left, right = right ^ (int.from_bytes(digest, "little") & mask), left
        value = (left << half_bits) | right
        if value < size:
            return value


@pytest.mark.parametrize("size", [HUGE, 2**36, 2**36 + 1])
def test_permute_has_an_inverse_at_sizes_that_cannot_be_enumerated(size: int) -> None:
    numbers = random.Random(0)
    for index in [0, 1, size - 1, *(numbers.randrange(size) for _ in range(2000))]:
        value = permute(index, size, "7/0/3")
        assert 0 <= value < size
        assert inverse_permute(value, size, "7/0/3") == index
        assert permute(inverse_permute(index, size, "7/0/3"), size, "7/0/3") == index


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], [1]),
        ([7, 3], [7, 3]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.5, 1 / 3, 1 / 6], [500_000, 333_333, 166_667]),  # as decimal numbers these are no thirds and sixths
        ([1e-05, 1], [1, 100_000]),
        ([1.5, 4.5, 3], [1, 3, 2]),
        ([1e-9, 1], [0, MAX_CYCLE]),
    ],
)
def test_the_cycle_of_a_blend_is_the_common_denominator_of_its_weights(weights: list[float], counts: list[int]) -> None:
    blend = Blend(weights)
    assert blend.counts == counts
    assert blend.length == sum(counts)


@settings(max_examples=100)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_rounded_counts_differ_from_the_weights_by_less_than_one_sample_a_cycle(weights: list[float]) -> None:
    blend = Blend(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert sum(blend.counts) == blend.length <= MAX_CYCLE
    for weight, count in zip(weights, blend.counts, strict=True):
        assert abs(count - Fraction(str(weight)) / total * blend.length) < 1


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1 / 3, 2 / 3], [5, 1, 1, 30], [2.5]])
def test_every_cycle_has_exactly_its_counts_and_no_sample_twice(weights: list[float]) -> None:
    blend = Blend(weights)
    located = [blend.locate(sample, "key") for sample in range(6 * blend.length)]
    for cycle in range(6):
        part = Counter(chosen for chosen, _ in located[cycle * blend.length : (cycle + 1) * blend.length])
        assert [part[chosen] for chosen in range(len(weights))] == blend.counts
    for chosen, count in enumerate(blend.counts):
        assert sorted(index for which, index in located if which == chosen) == list(range(6 * count))


def test_cycles_have_different_orders() -> None:
    blend = Blend([0.5, 0.3, 0.2])
    cycles = {tuple(blend.locate(cycle * 10 + index, "k")[0] for index in range(10)) for cycle in range(20)}
    assert len(cycles) > 15


def test_the_longest_cycle_is_located_correctly_late_in_a_run() -> None:
    blend = Blend([0.5, 1 / 3, 1 / 6])
    start = 10**8 * blend.length
    located = Counter(blend.locate(start + offset, "k")[0] for offset in range(0, blend.length, 1000))
    assert located[0] == pytest.approx(500, abs=60)
    assert {blend.locate(start + offset, "k")[1] // blend.counts[0] for offset in range(50)} >= {10**8}
