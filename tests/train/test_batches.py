"""Batches: prefetched in order, split over ranks, the same validation tokens on any number of ranks, blends in runs."""

import shutil
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run, fail, succeed
from tests.train.run_helpers import blend
from tostlm.checkpoint import checkpoints
from tostlm.data import VALIDATION, PreparationSettings, TokenSet, prepare, train_tokenizer
from tostlm.errors import UserError
from tostlm.launch import RankInfo
from tostlm.model import IGNORE, create_lm
from tostlm.train.batches import PREFETCHED_BATCHES, Batch, RankBatches, RunData, open_data, prefetch
from tostlm.train.engine import compute_loss

CPU = torch.device("cpu")


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def numbered(step: int) -> Batch:
    return Batch(torch.full((1, 4), step), torch.full((1, 4), step + 1), None)


@pytest.mark.parametrize("steps", [range(5), range(3, 4), range(7, 7)])
def test_prefetched_batches_come_in_order(steps: range) -> None:
    assert [int(batch.inputs[0, 0]) for batch in prefetch(numbered, steps, CPU)] == list(steps)
    assert not prefetch_threads()


def test_no_more_batches_are_read_than_are_prefetched() -> None:
    read = []

    def record(step: int) -> Batch:
        read.append(step)
        return numbered(step)

    with closing(prefetch(record, range(100), CPU)) as batches:
        for used in range(1, 4):
            next(batches)
            deadline = time.monotonic() + 30
            while len(read) < used + PREFETCHED_BATCHES and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert len(read) == used + PREFETCHED_BATCHES
    assert not prefetch_threads()


def test_an_error_while_reading_is_raised_where_the_batch_is_used(run: Run, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = np.memmap(copy / "train-00000.bin", "<u2", mode="r+")
    shard[:] = 60_000
    shard.flush()
    opened = open_data(run.config(f"data.path={copy}"), 1)
    with pytest.raises(UserError, match="holds token 60000"):
        next(RankBatches(opened, RankInfo(0, 0, 1), CPU).training(0))
    assert not prefetch_threads()


def test_an_error_while_training_ends_the_thread() -> None:
    with pytest.raises(ZeroDivisionError), closing(prefetch(numbered, range(100), CPU)) as batches:
        for _ in batches:
            assert prefetch_threads()
            raise ZeroDivisionError
    assert not prefetch_threads()


def test_each_rank_reads_its_share_of_a_step(run: Run) -> None:
    opened = open_data(run.config("data.reset_at_documents=true"), 2)
    with closing(RankBatches(opened, RankInfo(1, 1, 2), CPU).training(3)) as batches:
        for step in (3, 4):
            for ours, expected in zip(next(batches)[:3], opened.training.batch(step, 1, 2), strict=True):
                assert isinstance(ours, torch.Tensor) and expected is not None
                assert np.array_equal(ours.numpy(), expected)


def test_micro_batches_are_parts_of_the_batch_in_order(run: Run) -> None:
    opened = open_data(run.config("data.reset_at_documents=true"), 1)
    batch = Batch.from_numpy(opened.training.batch(0, 0, 1))
    micro_batches = batch.split(4)
    assert [part.inputs.shape for part in micro_batches] == [(2, 64)] * 4
    for field in ("inputs", "targets", "document_start_mask"):
        assert torch.equal(torch.cat([getattr(part, field) for part in micro_batches]), getattr(batch, field))


class Group(NamedTuple):
    """What a process group of four ranks says of itself."""

    own: int

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return 4


def test_slices_of_sequences_join_to_the_whole(run: Run) -> None:
    batch = open_data(run.config("data.reset_at_documents=true"), 1).training.batch(0, 0, 1)
    slices = [Batch.from_numpy(batch, Group(rank)) for rank in range(4)]
    assert {part.inputs.shape[1] for part in slices} == {16}
    for field in ("inputs", "targets", "document_start_mask"):
        joined = torch.cat([getattr(part, field) for part in slices], 1)
        assert torch.equal(joined, getattr(Batch.from_numpy(batch), field))


def scored_rows(batches: list[Batch]) -> list[bytes]:
    """The sequences that are scored; a sequence is scored whole or not at all."""
    rows = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            assert (targets != IGNORE).all() or (targets == IGNORE).all()
            if targets[0] != IGNORE:
                rows.append(inputs.numpy().tobytes())
    return rows


def read_held_out(data: RunData, ranks: RankInfo) -> list[Batch]:
    batches = RankBatches(data, ranks, CPU)
    return [batch for part in data.held_out for batch in batches.held_out(part)]


@pytest.mark.parametrize("sequences", [1, 5, 7, 8])
def test_validation_reads_the_same_sequences_on_any_number_of_ranks(run: Run, sequences: int) -> None:
    expected = None
    for world_size in (1, 2, 4):
        config = run.config(f"train.eval_tokens={64 * sequences + 63}")
        opened = open_data(config, world_size)
        ranks = [RankInfo(rank, rank, world_size) for rank in range(world_size)]
        read = [read_held_out(opened, rank) for rank in ranks]
        assert len({len(batches) for batches in read}) == 1  # every rank makes equally many forward passes
        assert {batch.inputs.shape for batches in read for batch in batches} == {(2, 64)}
        rows = sorted(row for batches in read for row in scored_rows(batches))
        assert len(rows) == sequences
        expected = expected or rows
        assert rows == expected


def test_validation_text_has_the_longest_context_and_the_weights_of_the_blend(
    run: Run, data: Path, digits: Path
) -> None:
    stages = "data.curriculum=[{until_step: 2, context_tokens: 16}]"
    config = run.config(stages, *blend((data, 1), (digits, 1)), "train.eval_tokens=256")
    batches = read_held_out(open_data(config, 2), RankInfo(0, 0, 1))
    held = TokenSet(digits, VALIDATION)
    windows = {row.tobytes() for row in held.read(0, len(held) // 64 * 64).reshape(-1, 64)}
    assert sum(row in windows for row in scored_rows(batches)) == 2
    assert len(scored_rows(batches)) == 4


STAGES = "data.curriculum=[{until_step: 2, context_tokens: 16}, {until_step: 5, context_tokens: 32}]"


def test_a_blend_with_a_curriculum_resumes_exactly(run: Run, data: Path, digits: Path) -> None:
    overrides = [*blend((data, 0.7), (digits, 0.3)), STAGES, "data.within_documents=true"]
    succeed(run.train(*overrides, nproc=2))
    reported = (("train", "loss"), ("train", "grad_norm"), ("validation", "loss"), ("train", "epoch/digits"))
    before = {(kind, key): run.metrics(kind, key) for kind, key in reported}
    loader = open_data(run.config(*overrides), 2).training
    for name in ("prepared", "digits"):
        assert run.metrics("train", f"epoch/{name}") == {step: loader.epochs(step)[name] for step in range(1, 7)}
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"train/epoch/prepared", "train/epoch/digits"}

    shutil.rmtree(checkpoints(run.dir)[-1])  # the other one is of step 3, inside the second stage
    succeed(run.train(*overrides, nproc=2))
    assert {(kind, key): run.metrics(kind, key) for kind, key in reported} == before
    shutil.rmtree(checkpoints(run.dir)[-1])
    weights = blend((data, 0.6), (digits, 0.4))
    fail(run.train(*overrides, *weights, nproc=2), "has data.blend.0.weight=0.7, this run data.blend.0.weight=0.6")
    others = blend((digits, 0.7), (data, 0.3))
    fail(run.train(*overrides, *others, nproc=2), f"was trained on other data than {digits}, {data} hold")


@torch.no_grad()
def test_training_forgets_at_document_starts(run: Run) -> None:
    sizes = ["data.context_tokens=512", "train.batch_tokens=8192", "train.micro_batch_tokens=2048"]
    overrides = ["data.reset_at_documents=true", "model.layer_scale=20.0", "model.layers=[{mixer: tssa}]", *sizes]
    succeed(run.train(*overrides, "optimizer.lr=1e-3", nproc=2))
    config = run.config(*overrides)
    lm = create_lm(config.model, config.seed)
    batch = Batch.from_numpy(open_data(config, 1).training.batch(0, 0, 1))
    across_documents = batch._replace(document_start_mask=None)
    assert run.metrics("train")[1] == pytest.approx(float(compute_loss(lm, batch)[0]), abs=1e-5)
    assert run.metrics("train")[1] != pytest.approx(float(compute_loss(lm, across_documents)[0]), abs=3e-5)


def test_data_that_does_not_fit_is_rejected(
    run: Run, data: Path, corpus: Path, speeches: list[str], tmp_path: Path
) -> None:
    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2), other, tmp_path / "other")
    two = blend((data, 1), (tmp_path / "other", 1))
    fail(run.train(*two), f"{data} and {tmp_path}/other were prepared with different tokenizers")
    long = ["data.context_tokens=8192", "train.batch_tokens=8192", "train.micro_batch_tokens=8192"]
    fail(
        run.train("data.within_documents=true", *long), "no document of the train split of", "lower data.context_tokens"
    )
    assert not checkpoints(run.dir)
