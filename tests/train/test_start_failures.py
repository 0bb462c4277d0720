"""Exit codes when a rank fails before the first step: a lost rank is restartable, a bug is no user error."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import deepspeed
import pytest
import torch

from tests.conftest import Run, fail
from tests.warm import Program
from tostlm.errors import EXIT_BUG, EXIT_LOST_RANK, EXIT_USER_ERROR
from tostlm.launch import RankInfo
from tostlm.launch.local import rank_env
from tostlm.train import engine, trainer
from tostlm.train.batches import open_data

Ended = list["subprocess.CompletedProcess[str]"]


def train_two_ranks(run: Run, harm: Callable[[], None] | None, victim: int) -> Ended:
    """Train on two ranks without a launcher, one of which runs `harm` first, and return how the ranks ended."""
    environments = rank_env(2)
    ranks = [
        Program("train", str(run.file), before=harm if rank == victim else None, **environments[rank])
        for rank in range(2)
    ]
    return [rank.end(120) for rank in ranks]


def die_in_initialize() -> None:
    deepspeed.initialize = lambda **_: os.kill(os.getpid(), 9)


def exhaust_memory_in_initialize() -> None:
    def initialize(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    deepspeed.initialize = initialize


def broken(*_: object) -> None:
    raise ZeroDivisionError("a bug in the checks")


def break_checks() -> None:
    trainer.lock_for_life = broken


def test_a_rank_lost_while_deepspeed_starts_is_restartable(run: Run) -> None:
    """Rank 0 is lost. Of another rank, rank 0 would wait in torch's store until its launcher ends it."""
    _, survivor = train_two_ranks(run, die_in_initialize, victim=0)
    assert survivor.returncode == EXIT_LOST_RANK, survivor.stderr
    assert "deepspeed block" not in survivor.stderr


def reject_in_initialize() -> None:
    def initialize(*_: object, **__: object) -> None:
        raise AssertionError("these options\ndo not go together")

    deepspeed.initialize = initialize


def test_what_deepspeed_rejects_is_a_user_error(run: Run) -> None:
    (place,) = rank_env(1)
    ended = Program("train", str(run.file), before=reject_in_initialize, **place).end(120)
    fail(ended, "DeepSpeed rejects the deepspeed block: these options do not go together")


def test_running_out_of_memory_while_deepspeed_starts_is_restartable(run: Run) -> None:
    first, second = train_two_ranks(run, exhaust_memory_in_initialize, victim=0)
    assert first.stderr.startswith("tostlm: error: out of memory (CUDA out of memory. Tried"), first.stderr
    assert first.stderr.count("\n") == 1
    assert first.returncode == second.returncode == EXIT_LOST_RANK


def test_a_bug_in_the_checks_of_rank_0_is_no_user_error(run: Run) -> None:
    first, second = train_two_ranks(run, break_checks, 0)
    assert first.returncode == EXIT_BUG
    assert "ZeroDivisionError" in first.stderr
    assert (second.returncode, second.stderr) == (EXIT_LOST_RANK, "")


@pytest.mark.slow
def test_the_lock_of_a_build_that_was_killed_is_named(run: Run, tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    offload = "deepspeed.zero_optimization={stage: 1, offload_optimizer: {device: cpu}}"
    (place,) = rank_env(1)
    waiting = Program("train", str(run.file), offload, TORCH_EXTENSIONS_DIR=str(tmp_path), **place)
    time.sleep(20)
    lock.unlink()
    ended = waiting.end(120)
    assert ended.returncode == EXIT_USER_ERROR  # torch waited for a build that nobody did
    assert f"if none is, one was killed: remove {lock}, and start again" in ended.stderr


def test_a_failed_check_of_rank_0_is_reported_once(run: Run) -> None:
    (run.dir / "checkpoints" / "step-9").mkdir(parents=True)
    first, second = train_two_ranks(run, None, 0)
    fail(first, "step-9")
    assert (second.returncode, second.stderr) == (EXIT_USER_ERROR, "")


LOST = ["[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3456"]
LOST += ["NCCL error: remote process exited or there was a network error"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("message", LOST)
@pytest.mark.parametrize("wrapper", [None, AssertionError])
def test_lost_peers_keep_their_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int, message: str, wrapper: type[Exception] | None
) -> None:
    def initialize(**_: object) -> Sequence[object]:
        if wrapper is None:
            raise RuntimeError(message)
        raise wrapper("inconsistent") from RuntimeError(message)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    config = run.config()
    plan = open_data(config, 2).plan
    with pytest.raises(wrapper or RuntimeError) as error:
        engine.start_engine(config, plan, RankInfo(rank, rank, 2))
    assert message in str(error.value) or message in str(error.value.__cause__)
