"""A rank that hangs or dies is named, the job ends in time, and a restart resumes it."""

import json
import os
import re
import signal
import threading
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, succeed
from tests.train.run_helpers import wait_for_a_checkpoint
from tests.warm import Program
from tostlm.checkpoint import checkpoints, save, step_of
from tostlm.data import Loader
from tostlm.errors import EXIT_LOST_RANK
from tostlm.launch.local import rank_env
from tostlm.train import watchdog
from tostlm.train.watchdog import FAILED, LOST_PEER, Heartbeat, frozen_ranks, read_heartbeats, stalled_ranks

pytestmark = pytest.mark.timed

TIMEOUT = 10
LIMIT = 5.0


def beat(
    rank: int, writes: int = 1, step: int = 7, phase_index: int = 2, idle: float = 8.0, status: str | None = None
) -> Heartbeat:
    return Heartbeat(rank, "node", "boot", 100 + rank, "1", step, "forward", phase_index, writes, idle, status)


def verdict(earlier: list[Heartbeat], later: list[Heartbeat], world_size: int = 3) -> list[int]:
    before, after = ({beat.rank: beat for beat in beats} for beats in (earlier, later))
    return stalled_ranks(after, frozen_ranks(before, after, world_size), LIMIT)


EARLIER = [beat(0), beat(1), beat(2)]


def test_a_rank_without_new_heartbeats_is_stalled() -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1), beat(2, 3)]) == [1]
    assert verdict(EARLIER, [beat(0, 3), beat(1), beat(2)]) == [1, 2]
    assert verdict(EARLIER, [beat(0, 3), beat(2, 3)]) == [1]  # a node lost with its file system, or never started


def test_if_all_ranks_write_heartbeats_the_furthest_behind_are_stalled() -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, step=6, phase_index=5), beat(2, 3)]) == [1]
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, phase_index=1), beat(2, 3, phase_index=1)]) == [1, 2]
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3), beat(2, 3)]) == [0, 1, 2]


def test_no_rank_is_stalled_while_any_main_thread_makes_progress() -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, idle=0.5), beat(2, 3)]) == []
    assert verdict(EARLIER, [beat(0, 3), beat(1), beat(2, 3, idle=0.5)]) == []
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, idle=-1700.0), beat(2, 3)]) == []  # that may still compile


@pytest.mark.parametrize("status", [FAILED, LOST_PEER])
def test_a_rank_that_reported_why_it_ends_is_not_stalled(status: str) -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1, status=status), beat(2)]) == [2]


class WatchedRun:
    """A training run on two ranks that has saved a checkpoint."""

    def __init__(self, run: Run) -> None:
        self.run = run
        endless = ["train.steps=100000", "train.keep_last_checkpoints=2", f"train.hang_timeout_seconds={TIMEOUT}"]
        self.program = run.start(*endless, nproc=2)
        wait_for_a_checkpoint(run)
        self.beats = read_heartbeats(run.dir / "heartbeats", 2)

    def end(self, seconds: float) -> str:
        """Wait up to `seconds` for the run to end with a lost rank, and return the one line on stderr."""
        ended = self.program.end(seconds)
        assert ended.returncode == EXIT_LOST_RANK, ended.stderr
        (line,) = ended.stderr.strip().splitlines()
        assert not [beat for beat in self.beats.values() if Path(f"/proc/{beat.pid}").exists()]
        return line


@pytest.fixture
def job(run: Run) -> WatchedRun:
    return WatchedRun(run)


def stick() -> None:
    """Make this rank start slowly, and hang before its fourth step."""
    batch = Loader.batch

    def stuck(self: Loader, step: int, *rank_and_world_size: int) -> Any:
        time.sleep({0: 9, 3: 3600}.get(step, 0))
        return batch(self, step, *rank_and_world_size)

    Loader.batch = stuck


def assert_resumes(run: Run) -> None:
    reached = step_of(checkpoints(run.dir)[-1])
    succeed(run.train(f"train.steps={reached + 2}", nproc=2))
    assert list(run.metrics("train")) == list(range(1, reached + 3))
    assert not (run.dir / "heartbeats").exists()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_named_within_the_timeout(job: WatchedRun, victim: int) -> None:
    """Rank 0 too, whose process holds torch's store."""
    os.kill(job.beats[victim].pid, signal.SIGSTOP)
    line = job.end(TIMEOUT)
    assert re.fullmatch(
        rf"tostlm: rank {victim} on {job.beats[0].host} \(pid {job.beats[victim].pid}\) has made no progress since "
        r"step \d+ \(\w+\) for [6-9] s; stacks are in .*/hang-step-\d+; "
        "run the same command to resume from the newest checkpoint",
        line,
    )
    (folder,) = job.run.dir.glob("hang-step-*")
    assert str(folder) in line
    ranks = json.loads((folder / "ranks.json").read_text())
    assert [rank["stalled"] for rank in ranks] == [rank == victim for rank in (0, 1)]
    for rank in ranks:
        assert "tostlm/train/trainer.py" in (folder / rank["stack"]).read_text()
    if victim == 1:
        assert_resumes(job.run)
        assert folder.exists()


def test_a_killed_rank_is_named_at_once(job: WatchedRun) -> None:
    os.kill(job.beats[1].pid, signal.SIGKILL)
    line = job.end(10)
    assert re.fullmatch(
        rf"tostlm: rank 1 on {job.beats[0].host} \(pid {job.beats[1].pid}\) died without an error message in step \d+; "
        "run the same command to resume from the newest checkpoint",
        line,
    )
    assert_resumes(job.run)


def test_a_rank_stuck_in_python_is_named_though_its_watchdog_thread_runs(run: Run) -> None:
    """Both ranks end by themselves, without a launcher. A start that takes longer than the timeout is no hang."""
    arguments = ["train", str(run.file), "train.hang_timeout_seconds=8", "train.save_every_steps=100"]
    healthy, sick = rank_env(2)
    ranks = [Program(*arguments, **healthy), Program(*arguments, before=stick, **sick)]
    ended = [rank.end(120) for rank in ranks]
    assert [rank.returncode for rank in ended] == [EXIT_LOST_RANK] * 2, ended
    (line,) = "".join(rank.stderr for rank in ended).strip().splitlines()
    assert re.search(
        rf"rank 1 on \S+ \(pid {ranks[1].pid}\) has made no progress since step 3 \(data\) for [4-8] s;", line
    ), line
    assert list(run.metrics("train")) == [1, 2, 3]
    (folder,) = run.dir.glob("hang-step-*")
    assert "stuck" in (folder / "rank-00001.txt").read_text()
    assert "tostlm/train/engine.py" in (folder / "rank-00000.txt").read_text()


def hang_files(everything: bool) -> None:
    """From the second or third save on, no file is ever forced to the disk, or with `everything` written at all."""
    fsync, calls = os.fsync, count(1)

    def hang(*_: object, **__: object) -> Any:
        time.sleep(3600)

    def slow_fsync(descriptor: int) -> None:
        if threading.current_thread().name.startswith("save") and next(calls) > 20:
            if everything:
                watchdog.write_atomically = watchdog.read_heartbeats = hang
            hang()
        fsync(descriptor)

    os.fsync = slow_fsync


@pytest.mark.parametrize(
    ("everything", "background"),
    [
        (False, "true"),
        (True, "false"),
        pytest.param(False, "false", marks=pytest.mark.slow),
        pytest.param(True, "true", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_hangs_ends_the_run_in_time(run: Run, everything: bool, background: str) -> None:
    """Whether the watching thread still writes its own files or hangs too."""
    (place,) = rank_env(1)
    options = [f"train.hang_timeout_seconds={TIMEOUT}", f"train.save_in_background={background}", "train.steps=1000"]
    program = Program("train", str(run.file), *options, before=partial(hang_files, everything), **place)
    ended = program.end(120)
    assert ended.returncode == EXIT_LOST_RANK
    since_the_last_save = time.time() - (checkpoints(run.dir)[-1] / "COMPLETE").stat().st_mtime
    assert since_the_last_save < 2 * TIMEOUT
    (line,) = ended.stderr.strip().splitlines()
    words = "has not answered for" if everything else r"has made no progress since step \d+ \(save\)"
    assert re.search(rf"rank 0 on \S+ \(pid {program.pid}\):? .*{words}", line), line


def die_while_saving() -> None:
    def die(*_: object) -> Any:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    save.write_file = die


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_rank_killed_while_it_saves_is_named_at_once(run: Run, background: str) -> None:
    first, second = rank_env(2)
    options = ["train.hang_timeout_seconds=100", f"train.save_in_background={background}", "train.steps=1000"]
    survivor = Program("train", str(run.file), *options, **first)
    victim = Program("train", str(run.file), *options, before=die_while_saving, **second)
    assert victim.end().returncode == -signal.SIGKILL
    ended = survivor.end(15)
    assert ended.returncode == EXIT_LOST_RANK
    assert re.search(rf"rank 1 on \S+ \(pid {victim.pid}\) died without an error message", ended.stderr)
