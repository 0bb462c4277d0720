"""A rank that hangs or dies: who is named, how soon the job ends, and that it goes on."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tostlm.train.heartbeat import FAILED, PARTED, Heartbeat, culprits, read_heartbeats

from tests.conftest import Run, succeed
from tests.train.test_training import wait_for_a_checkpoint
from tests.warm import Program
from tostlm.checkpoint import checkpoints, step_of
from tostlm.data import Loader
from tostlm.errors import EXIT_LOST_RANK
from tostlm.launch.local import rank_env

pytestmark = pytest.mark.alone

TIMEOUT = 10
LIMIT = 5.0


def beat(
    rank: int, beats: int = 1, step: int = 7, place: int = 2, quiet: float = 8.0, last_word: str | None = None
) -> Heartbeat:
    return Heartbeat(rank, "node", "boot", 100 + rank, "1", step, "forward", place, 20, beats, quiet, last_word)


def verdict(earlier: list[Heartbeat], later: list[Heartbeat], world_size: int = 3) -> list[int]:
    return culprits({b.rank: b for b in earlier}, {b.rank: b for b in later}, world_size, LIMIT)


EARLIER = [beat(0), beat(1), beat(2)]


def test_a_rank_whose_own_thread_does_not_beat_is_to_blame() -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1), beat(2, 3)]) == [1]
    assert verdict(EARLIER, [beat(0, 3), beat(1), beat(2)]) == [1, 2]
    assert verdict(EARLIER, [beat(0, 3), beat(2, 3)]) == [1]  # a node lost with its file system, or never started


def test_of_ranks_that_all_beat_the_furthest_behind_are_to_blame() -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, step=6, place=5), beat(2, 3)]) == [1]
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, place=1), beat(2, 3, place=1)]) == [1, 2]
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3), beat(2, 3)]) == [0, 1, 2]


def test_nobody_is_to_blame_while_any_main_thread_moves() -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, quiet=0.5), beat(2, 3)]) == []
    assert verdict(EARLIER, [beat(0, 3), beat(1), beat(2, 3, quiet=0.5)]) == []
    assert verdict(EARLIER, [beat(0, 3), beat(1, 3, quiet=-1700.0), beat(2, 3)]) == []  # that may still compile


@pytest.mark.parametrize("last_word", [FAILED, PARTED])
def test_a_rank_that_said_why_it_ends_is_not_to_blame(last_word: str) -> None:
    assert verdict(EARLIER, [beat(0, 3), beat(1, last_word=last_word), beat(2)]) == [2]


class Job:
    """A run of two ranks under way, that has a checkpoint."""

    def __init__(self, run: Run) -> None:
        self.run = run
        endless = ["train.steps=100000", "train.keep_last_checkpoints=2", f"train.hang_timeout_seconds={TIMEOUT}"]
        self.program = run.start(*endless, nproc=2)
        wait_for_a_checkpoint(run)
        self.beats = read_heartbeats(run.dir / "heartbeats", 2)

    def end(self, seconds: float) -> str:
        """The one line that it says when it ends, within `seconds`, because a rank is lost."""
        ended = self.program.end(seconds)
        assert ended.returncode == EXIT_LOST_RANK, ended.stderr
        (line,) = ended.stderr.strip().splitlines()
        assert not [beat for beat in self.beats.values() if Path(f"/proc/{beat.pid}").exists()]
        return line


@pytest.fixture
def job(run: Run) -> Job:
    return Job(run)


def stick() -> None:
    """Start slowly, and never come to the fourth step."""
    batch = Loader.batch

    def stuck(self: Loader, step: int, *place: int) -> Any:
        time.sleep({0: 9, 3: 3600}.get(step, 0))
        return batch(self, step, *place)

    Loader.batch = stuck  # type: ignore[method-assign]


def goes_on(run: Run) -> None:
    reached = step_of(checkpoints(run.dir)[-1])
    succeed(run.train(f"train.steps={reached + 2}", nproc=2))
    assert list(run.metrics("train")) == list(range(1, reached + 3))
    assert not (run.dir / "heartbeats").exists()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_named_in_time(job: Job, victim: int) -> None:
    """Rank 0 too, whose process holds torch's store."""
    os.kill(job.beats[victim].pid, signal.SIGSTOP)
    line = job.end(TIMEOUT)
    assert re.fullmatch(
        rf"tostlm: rank {victim} on {job.beats[0].host} \(pid {job.beats[victim].pid}\) has not moved since step "
        r"\d+ \(\w+\) for [6-9] s; stacks are in .*/hang-step-\d+; start again to go on from the newest checkpoint",
        line,
    )
    (folder,) = job.run.dir.glob("hang-step-*")
    assert str(folder) in line
    ranks = json.loads((folder / "ranks.json").read_text())
    assert [rank["to_blame"] for rank in ranks] == [rank == victim for rank in (0, 1)]
    for rank in ranks:
        assert "tostlm/train/loop.py" in (folder / rank["stack"]).read_text()
    if victim == 1:
        goes_on(job.run)
        assert folder.exists()


def test_a_killed_rank_is_named_at_once(job: Job) -> None:
    os.kill(job.beats[1].pid, signal.SIGKILL)
    line = job.end(10)
    assert re.fullmatch(
        rf"tostlm: rank 1 on {job.beats[0].host} \(pid {job.beats[1].pid}\) ended without a word in step \d+; "
        "start again to go on from the newest checkpoint",
        line,
    )
    goes_on(job.run)


def test_a_rank_stuck_in_python_is_named_though_its_watcher_lives(run: Run) -> None:
    """Without a launcher of ours, both ranks end by themselves. A start longer than the timeout is no hang."""
    arguments = ["train", str(run.file), "train.hang_timeout_seconds=8", "train.save_every_steps=100"]
    healthy, sick = rank_env(2)
    ranks = [Program(*arguments, **healthy), Program(*arguments, before=stick, **sick)]
    ended = [rank.end(120) for rank in ranks]
    assert [rank.returncode for rank in ended] == [EXIT_LOST_RANK] * 2, ended
    (line,) = "".join(rank.stderr for rank in ended).strip().splitlines()
    assert re.search(rf"rank 1 on \S+ \(pid {ranks[1].pid}\) has not moved since step 3 \(data\) for [4-8] s;", line), (
        line
    )
    assert list(run.metrics("train")) == [1, 2, 3]
    (folder,) = run.dir.glob("hang-step-*")
    assert "stuck" in (folder / "rank-00001.txt").read_text()
    assert "tostlm/train/engine.py" in (folder / "rank-00000.txt").read_text()
