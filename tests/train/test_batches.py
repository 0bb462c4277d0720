"""What a run reads: batches made ahead, in order, and the whole of a blend and a curriculum in real runs."""

import shutil
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run, fail, succeed
from tostlm.checkpoint import checkpoints
from tostlm.data import TRAIN, VALIDATION, ContextStage, Loader, PreparationSettings, TokenSet, prepare, train_tokenizer
from tostlm.errors import UserError
from tostlm.launch import RankInfo
from tostlm.model import create_lm
from tostlm.train.batches import AHEAD, Batch, prefetch, training_loader, validation_loader

CPU = torch.device("cpu")
ALONE = RankInfo(0, 0, 1)


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def blend(*sets: tuple[Path, float]) -> list[str]:
    listed = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in sets)
    return ["data.path=null", f"data.blend=[{listed}]"]


@pytest.mark.parametrize("steps", [range(5), range(3, 4), range(7, 7)])
def test_the_batches_of_the_loader_in_order(run: Run, steps: range) -> None:
    loader = training_loader(run.config("data.reset_at_documents=true"))
    rank = RankInfo(1, 1, 2)
    rows = list(prefetch(loader, steps, rank, CPU))
    assert len(rows) == len(steps)
    for step, made in zip(steps, rows, strict=True):
        for ours, theirs in zip(made[:3], loader.batch(step, 1, 2), strict=True):
            assert np.array_equal(ours.numpy(), theirs)
    assert not feed_threads()


def test_rows_split_into_passes(run: Run) -> None:
    loader = training_loader(run.config("data.reset_at_documents=true"))
    (rows,) = prefetch(loader, range(1), ALONE, CPU)
    passes = rows.split(4)
    assert [part.inputs.shape for part in passes] == [(2, 64)] * 4
    for place in range(3):
        assert torch.equal(torch.cat([part[place] for part in passes]), rows[place])


class Watched(TokenSet):
    """A real set that keeps count of the windows read."""

    reads = 0

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        return super().tokens(start, stop)


def test_batches_are_made_ahead_and_no_further(data: Path) -> None:
    tokens = Watched(data, TRAIN)
    loader = Loader([(tokens, 1.0)], [ContextStage(0, 64, 1)], seed=0)
    with closing(prefetch(loader, range(100), ALONE, CPU)) as batch_plan:
        for done in range(1, 4):
            next(batch_plan)
            deadline = time.monotonic() + 30
            while tokens.reads < done + AHEAD and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert tokens.reads == done + AHEAD
    assert not feed_threads()


def test_an_error_of_the_thread_ends_the_loop(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = np.memmap(copy / "train-00000.bin", "<u2", mode="r+")
    shard[:] = 60_000
    shard.flush()
    loader = Loader([(TokenSet(copy, TRAIN), 1.0)], [ContextStage(0, 64, 1)], seed=0)
    with pytest.raises(UserError, match="holds token 60000"):
        next(prefetch(loader, range(100), ALONE, CPU))
    assert not feed_threads()


def test_the_thread_ends_with_the_loop(run: Run) -> None:
    loader = training_loader(run.config())
    with pytest.raises(ZeroDivisionError), closing(prefetch(loader, range(100), ALONE, CPU)) as batch_plan:
        for _ in batch_plan:
            assert feed_threads()
            raise ZeroDivisionError
    assert not feed_threads()


def test_heldout_text_is_read_at_the_longest_context_with_the_same_weights(run: Run, data: Path, digits: Path) -> None:
    stages = "data.curriculum=[{until_step: 2, context_tokens: 16}]"
    config = run.config(stages, *blend((data, 1), (digits, 1)))
    inputs, _, _ = validation_loader(config, world_size=2).batch(0, 0, 1)
    assert inputs.shape == (4, 64)
    held = TokenSet(digits, VALIDATION)
    windows = {row.tobytes() for row in held.tokens(0, len(held) // 64 * 64).reshape(-1, 64)}
    assert sum(row.tobytes() in windows for row in inputs) == 2


STAGES = "data.curriculum=[{until_step: 2, context_tokens: 16}, {until_step: 5, context_tokens: 32}]"


def test_a_blend_in_stages_resumes_exactly(run: Run, data: Path, digits: Path) -> None:
    overrides = [*blend((data, 0.7), (digits, 0.3)), STAGES, "data.within_documents=true"]
    succeed(run.train(*overrides, nproc=2))
    reported = (("train", "loss"), ("train", "grad_norm"), ("heldout", "loss"), ("train", "epoch/digits"))
    before = {(kind, key): run.metrics(kind, key) for kind, key in reported}
    loader = training_loader(run.config(*overrides))
    for name in ("prepared", "digits"):
        assert run.metrics("train", f"epoch/{name}") == {step: loader.epochs(step)[name] for step in range(1, 7)}
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"train/epoch/prepared", "train/epoch/digits"}

    shutil.rmtree(checkpoints(run.dir)[-1])  # the other is of step 3, inside the second stage
    succeed(run.train(*overrides, nproc=2))
    assert {(kind, key): run.metrics(kind, key) for kind, key in reported} == before
    shutil.rmtree(checkpoints(run.dir)[-1])
    weights = blend((data, 0.6), (digits, 0.4))
    fail(run.train(*overrides, *weights, nproc=2), "has data.blend.0.weight=0.7, this run data.blend.0.weight=0.6")
    others = blend((digits, 0.7), (data, 0.3))
    fail(run.train(*overrides, *others, nproc=2), f"was trained on other data than {digits}, {data} hold")


@torch.no_grad()
def test_a_run_forgets_at_documents(run: Run) -> None:
    sizes = ["data.context_tokens=512", "train.batch_tokens=8192", "train.micro_batch_tokens=2048"]
    overrides = ["data.reset_at_documents=true", "model.layer_scale=20.0", "model.layers=[{mixer: tssa}]", *sizes]
    succeed(run.train(*overrides, "optimizer.lr=1e-3", nproc=2))
    config = run.config(*overrides)
    lm = create_lm(config.model, config.seed)
    first = Batch.of(training_loader(config).batch(0, 0, 1))
    assert run.metrics("train")[1] == pytest.approx(float(first.loss(lm)[0]), abs=1e-5)
    assert run.metrics("train")[1] != pytest.approx(float(first._replace(resets=None).loss(lm)[0]), abs=3e-5)


def test_runs_that_cannot_start(run: Run, data: Path, corpus: Path, speeches: list[str], tmp_path: Path) -> None:
    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2), other, tmp_path / "other")
    two = blend((data, 1), (tmp_path / "other", 1))
    fail(run.train(*two), f"{data} and {tmp_path}/other were prepared with different tokenizers")
    long = ["data.context_tokens=8192", "train.batch_tokens=8192", "train.micro_batch_tokens=8192"]
    fail(
        run.train("data.within_documents=true", *long), "no document of the train split of", "lower data.context_tokens"
    )
    assert not checkpoints(run.dir)
