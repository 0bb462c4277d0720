"""Batches are a pure function of (seed, step): no window is repeated or left out, on any number of ranks."""

import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tostlm.data import (
    TRAIN,
    BatchStage,
    Loader,
    PreparationSettings,
    TokenSet,
    common_tokenizer,
    prepare,
    train_tokenizer,
)
from tostlm.data.loading.token_set import Windows
from tostlm.errors import UserError

CONTEXT = 64


@pytest.fixture(scope="module")
def tokens(data: Path) -> TokenSet:
    return TokenSet(data, TRAIN)


def make_loader(tokens: TokenSet, sequences: int, seed: int = 0, context: int = CONTEXT, **options: Any) -> Loader:
    return Loader([(tokens, 1.0)], [BatchStage(0, context, sequences)], seed, **options)


def sort_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


def test_an_epoch_reads_every_window_once(tokens: TokenSet) -> None:
    loader = make_loader(tokens, sequences=1, seed=3)
    count = (len(tokens) - 1) // CONTEXT
    rows = np.concatenate([loader.batch(step, 0, 1).inputs for step in range(count)])
    windows = tokens.read(0, count * CONTEXT).reshape(-1, CONTEXT)
    assert not np.array_equal(rows, windows)
    assert np.array_equal(sort_rows(rows), sort_rows(windows))


def test_targets_are_the_next_tokens(tokens: TokenSet) -> None:
    inputs, targets, mask = make_loader(tokens, 8).batch(5, 0, 1)
    assert inputs.shape == targets.shape == (8, CONTEXT)
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert mask is None


def test_the_mask_is_true_at_the_end_of_document_token_before_a_document(tokens: TokenSet) -> None:
    eos_id = tokens.manifest.eos_id
    inputs, _, mask = make_loader(tokens, 1024, eos_id=eos_id).batch(0, 0, 1)
    assert mask is not None
    assert mask.dtype == bool
    assert mask.any()
    assert np.array_equal(mask, inputs == eos_id)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_same_batch_whatever_their_number(tokens: TokenSet, world_size: int) -> None:
    loader = make_loader(tokens, 8)
    for step in (0, 7, 1000):
        shares = [loader.batch(step, rank, world_size).inputs for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), loader.batch(step, 0, 1).inputs)


def test_seeds_and_epochs_have_different_orders(tokens: TokenSet) -> None:
    first = make_loader(tokens, 8).batch(3, 0, 1).inputs
    assert np.array_equal(first, make_loader(tokens, 8).batch(3, 0, 1).inputs)
    assert not np.array_equal(first, make_loader(tokens, 8, seed=1).batch(3, 0, 1).inputs)
    one, count = make_loader(tokens, 1), (len(tokens) - 1) // CONTEXT
    assert not np.array_equal(one.batch(0, 0, 1).inputs, one.batch(count, 0, 1).inputs)
    assert one.epochs(count) == {"prepared": 1.0}
    assert one.epochs(count // 2)["prepared"] == pytest.approx(0.5, abs=1 / count)


def test_stateful_rows_continue_where_they_ended(tokens: TokenSet) -> None:
    eos_id, S = tokens.manifest.eos_id, 8
    loader = make_loader(tokens, S, eos_id=eos_id, stateful=True)
    count = (len(tokens) - 1) // CONTEXT
    steps = [loader.batch(step, 0, 1) for step in range(count + 1)]
    windows = {row.tobytes(): number for number, row in enumerate(tokens.read(0, count * CONTEXT).reshape(-1, CONTEXT))}
    numbers = np.array([[windows[row.tobytes()] for row in inputs] for inputs, _, _ in steps])  # [steps, S]
    assert (np.diff(numbers, axis=0) % count == 1).all()  # each row continues with the next window
    assert set(numbers[: -(-count // S)].flat) == set(range(count))  # together the rows read every window in an epoch
    for (inputs, _, mask), row_numbers in zip(steps, numbers, strict=True):
        expected = inputs == eos_id
        expected[row_numbers == 0, 0] = True  # the last window of a set is not the context of its first
        assert mask is not None
        assert np.array_equal(mask, expected)
    shares = [loader.batch(5, rank, 4).inputs for rank in range(4)]
    assert np.array_equal(np.concatenate(shares), steps[5].inputs)
    assert loader.epochs(count) == {"prepared": float(S)}


def test_stateful_rows_are_divided_between_sets_by_weight(tokens: TokenSet, digits: Path) -> None:
    sets = [(tokens, 2.9), (TokenSet(digits, TRAIN), 1.1)]
    stages = [BatchStage(0, CONTEXT, 8)]
    inputs = Loader(sets, stages, 0, eos_id=tokens.manifest.eos_id, stateful=True).batch(0, 0, 1).inputs
    speeches = tokens.read(0, len(tokens) // CONTEXT * CONTEXT).reshape(-1, CONTEXT)
    known = {row.tobytes() for row in speeches}
    assert [row.tobytes() in known for row in inputs] == [True] * 6 + [False] * 2
    with pytest.raises(UserError, match=r"the weight 0\.01 of .* is less than one row of a step's 8"):
        Loader([(tokens, 1.0), (TokenSet(digits, TRAIN), 0.01)], stages, 0, stateful=True)


def test_a_set_shorter_than_one_window_is_refused(tokens: TokenSet) -> None:
    with pytest.raises(UserError, match="fewer than one window of 10000000"):
        make_loader(tokens, 1, context=10_000_000)


STAGES = [BatchStage(0, 16, 32), BatchStage(10, 32, 16), BatchStage(30, CONTEXT, 8)]


def test_a_stage_starts_at_its_first_step(tokens: TokenSet) -> None:
    loader = Loader([(tokens, 1.0)], STAGES, seed=0)
    shapes = {step: loader.batch(step, 0, 1).inputs.shape for step in (0, 9, 10, 29, 30, 10**8)}
    assert shapes == {0: (32, 16), 9: (32, 16), 10: (16, 32), 29: (16, 32), 30: (8, 64), 10**8: (8, 64)}


def test_every_context_has_its_own_permutation(tokens: TokenSet) -> None:
    count = (len(tokens) - 1) // 32
    stages = [BatchStage(0, 32, 1), BatchStage(7, 16, 1), BatchStage(8, 32, 1)]
    loader = Loader([(tokens, 1.0)], stages, seed=0)
    rows = np.concatenate([loader.batch(step, 0, 1).inputs for step in range(8, 8 + count)])
    assert np.array_equal(sort_rows(rows), sort_rows(tokens.read(0, count * 32).reshape(-1, 32)))
    assert not np.array_equal(rows[:7], np.concatenate([loader.batch(step, 0, 1).inputs for step in range(7)]))


def test_batches_of_other_sizes_read_on_in_one_order(tokens: TokenSet, digits: Path) -> None:
    sets = [(tokens, 0.7), (TokenSet(digits, TRAIN), 0.3)]
    growing = [BatchStage(0, 16, 4), BatchStage(5, 32, 1), BatchStage(8, 32, 2), BatchStage(11, 32, 4)]
    loaders = Loader(sets, growing, seed=0), Loader(sets, [BatchStage(0, 16, 4), BatchStage(5, 32, 1)], seed=0)
    found, one_by_one = (
        np.concatenate([loader.batch(step, 0, 1).inputs for step in range(5, steps)])
        for loader, steps in zip(loaders, (15, 5 + 3 + 6 + 16), strict=True)
    )
    assert np.array_equal(found, one_by_one)
    assert loaders[0].epochs(15) == loaders[1].epochs(5 + 3 + 6 + 16)


def test_epochs_are_summed_over_stages(tokens: TokenSet) -> None:
    loader = Loader([(tokens, 1.0)], STAGES, seed=0)
    counts = [(len(tokens) - 1) // stage.context for stage in STAGES]
    for step, steps in ((5, (5, 0, 0)), (10, (10, 0, 0)), (100, (10, 20, 70))):
        read = sum(s * stage.sequences / n for s, stage, n in zip(steps, STAGES, counts, strict=True))
        assert loader.epochs(step)["prepared"] == pytest.approx(read)


def test_a_stage_reads_only_documents_as_long_as_its_context(tokens: TokenSet) -> None:
    loader = Loader([(tokens, 1.0)], [BatchStage(0, 64, 8), BatchStage(5, 2500, 1)], seed=0, within_documents=True)
    windows = Windows(tokens, 2500, within_documents=True)
    expected = np.stack([windows[number][:-1] for number in range(len(windows))])
    rows = np.concatenate([loader.batch(step, 0, 1).inputs for step in range(5, 5 + len(windows))])
    assert np.array_equal(sort_rows(rows), sort_rows(expected))


@pytest.fixture(scope="module")
def digit_tokens(digits: Path) -> TokenSet:
    return TokenSet(digits, TRAIN)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_blend_has_exactly_its_weights_in_every_cycle(
    tokens: TokenSet, digit_tokens: TokenSet, world_size: int
) -> None:
    loader = Loader([(tokens, 0.7), (digit_tokens, 0.3)], [BatchStage(0, CONTEXT, 20)], seed=1)
    known = {row.tobytes() for row in digit_tokens.read(0, len(digit_tokens) // 64 * 64).reshape(-1, 64)}
    for step in range(5):  # a step holds two cycles
        rows = np.concatenate([loader.batch(step, rank, world_size).inputs for rank in range(world_size)])
        assert [sum(row.tobytes() in known for row in cycle) for cycle in (rows[:10], rows[10:])] == [3, 3]


def test_every_set_of_a_blend_has_its_own_epochs(tokens: TokenSet, digit_tokens: TokenSet) -> None:
    count = (len(digit_tokens) - 1) // CONTEXT
    loader = Loader([(tokens, 1), (digit_tokens, 2)], [BatchStage(0, CONTEXT, 3)], seed=1)
    ours = {row.tobytes() for row in tokens.read(0, len(tokens) // 64 * 64).reshape(-1, 64)}
    rows = [row.tobytes() for step in range(count) for row in loader.batch(step, 0, 1).inputs]
    first, both = (Counter(row for row in part if row not in ours) for part in (rows[: count // 2 * 3], rows))
    assert set(first.values()) == {1}
    assert set(both.values()) == {2}
    assert len(both) == count
    read = loader.epochs(50)
    assert read["digits"] == pytest.approx(100 / count)
    assert read["prepared"] == pytest.approx(50 / ((len(tokens) - 1) // CONTEXT))


def test_steps_within_reads_no_set_twice(tokens: TokenSet, digit_tokens: TokenSet) -> None:
    count = (len(digit_tokens) - 1) // CONTEXT
    loader = Loader([(tokens, 1), (digit_tokens, 1)], [BatchStage(0, CONTEXT, 4)], seed=0)
    assert loader.steps_within(16 * CONTEXT) == 4
    assert loader.steps_within(1) == 1
    assert loader.steps_within(10**12) == min(count, (len(tokens) - 1) // CONTEXT) * 2 // 4


def test_a_weight_too_small_to_be_sampled_is_refused(tokens: TokenSet, digit_tokens: TokenSet) -> None:
    with pytest.raises(UserError, match=r"the weight 1e-09 of .*digits is less than one sample in 1000000; raise it"):
        Loader([(tokens, 1.0), (digit_tokens, 1e-9)], [BatchStage(0, CONTEXT, 1)], seed=0)


def test_folders_with_different_tokenizers_are_refused(
    data: Path, corpus: Path, speeches: list[str], tmp_path: Path
) -> None:
    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2), other, tmp_path / "other")
    with pytest.raises(UserError, match=rf"{data} and {tmp_path}/other were prepared with different tokenizers"):
        common_tokenizer([data, data, tmp_path / "other"])


# A run of 1,024 ranks over 10^11 windows of computed tokens, each of which is its own position.
LONG = 1024
WINDOWS = 10**11
RANKS = 1024
SEQUENCES = 2 * RANKS  # of a step
WORLDS = [1, 2, 64, 512, RANKS]


class ComputedTokens(TokenSet):
    """A token set as long as the windows need that holds nothing in memory."""

    def __init__(self, name: str) -> None:
        self.folder = Path(name)

    def __len__(self) -> int:
        return WINDOWS * LONG + 1

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self)
        return np.arange(start, stop)

    def document_bounds_by_shard(self) -> Iterator[np.ndarray]:
        yield np.array([[0, len(self)]])


@pytest.fixture(scope="module")
def huge_loader() -> Loader:
    return Loader([(ComputedTokens("web"), 1.0)], [BatchStage(0, LONG, SEQUENCES)], seed=11)


def windows_of_step(loader: Loader, step: int, world_size: int) -> list[int]:
    """Return the numbers of the windows that all ranks read at a step, rank by rank."""
    first = np.concatenate([loader.batch(step, rank, world_size).inputs[:, 0] for rank in range(world_size)])
    assert not (first % LONG).any()
    numbers: list[int] = (first // LONG).tolist()
    return numbers


@pytest.mark.parametrize("step", [0, 12_345, 10**8])
def test_a_huge_step_is_the_same_on_any_number_of_ranks(huge_loader: Loader, step: int) -> None:
    alone = windows_of_step(huge_loader, step, 1)
    assert len(set(alone)) == SEQUENCES
    for world_size in WORLDS:
        assert windows_of_step(huge_loader, step, world_size) == alone


def test_changing_the_number_of_ranks_repeats_and_skips_no_window(huge_loader: Loader) -> None:
    last = WINDOWS // SEQUENCES - 2  # in the epoch
    for start in (0, last - len(WORLDS)):
        changing = [
            windows_of_step(huge_loader, start + offset, world_size) for offset, world_size in enumerate(WORLDS)
        ]
        steady = [windows_of_step(huge_loader, start + offset, RANKS) for offset in range(len(WORLDS))]
        assert changing == steady
        read = [number for step in changing for number in step]
        assert len(set(read)) == len(read) == SEQUENCES * len(WORLDS)


def test_the_next_epoch_has_another_order(huge_loader: Loader) -> None:
    assert huge_loader.epochs(10**8)["web"] == pytest.approx(2.048)
    assert windows_of_step(huge_loader, 0, RANKS) != windows_of_step(huge_loader, WINDOWS // SEQUENCES, RANKS)


@pytest.mark.parametrize("within_documents", [False, True])
def test_starting_at_a_late_step_takes_no_time_and_no_memory(within_documents: bool) -> None:
    """Also with a blend and a curriculum."""
    tracemalloc.start()
    sets = [(ComputedTokens("web"), 0.7), (ComputedTokens("books"), 1 / 3)]
    stages = [BatchStage(0, 256, 4 * SEQUENCES), BatchStage(10**6, LONG, SEQUENCES)]
    loader = Loader(sets, stages, seed=0, within_documents=within_documents)
    seconds = []
    for step in (0, 10**6, 10**8):
        start = time.perf_counter()
        for rank in range(0, RANKS, 64):
            assert len(loader.batch(step, rank, RANKS).inputs) in (2, 8)
        seconds.append(time.perf_counter() - start)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(seconds) < 2  # for the batches of 16 ranks, at the first step and at the last
    assert held < 200_000
    assert peak < 1_000_000
