"""Twenty times killed at random, a run ends with the loss curve of the run never killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import Run, succeed
from tostlm.checkpoint import checkpoints, read_train_state, step_of
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE

KILLS = 20
OVERRIDES = ["train.save_every_steps=5", "train.keep_last_checkpoints=3", "train.eval_every_steps=20"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twenty_times(data: Path, tmp_path: Path) -> None:
    steps = f"train.steps={KILLS * 40}"
    (tmp_path / "calm").mkdir()
    calm = Run(tmp_path / "calm", data)
    succeed(calm.train(*OVERRIDES, steps, nproc=2))

    run, chance = Run(tmp_path, data), random.Random(0)
    done = []
    for _ in range(KILLS):
        before = read_train_state(checkpoints(run.dir)[-1]).step if checkpoints(run.dir) else 0
        program = run.start(*OVERRIDES, steps, nproc=2)
        while program.running() and (not checkpoints(run.dir) or step_of(checkpoints(run.dir)[-1]) < before + 10):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))  # in a step, an evaluation or a save
        ranks = program.children()
        victim = chance.choice(["rank 0", "rank 1", "launcher", "request"])
        if victim.startswith("rank"):
            os.kill(ranks[int(victim[-1])], signal.SIGKILL)
        else:
            program.send_signal(signal.SIGKILL if victim == "launcher" else signal.SIGTERM)
        ended = program.end(120)
        assert ended.returncode in (EXIT_LOST_RANK, EXIT_REQUEUE, -signal.SIGKILL), ended.stderr
        assert "Traceback" not in ended.stderr
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # those of a killed launcher save and end
            time.sleep(0.1)
        done.append((victim, step_of(checkpoints(run.dir)[-1])))
    succeed(run.train(*OVERRIDES, steps, nproc=2))
    print(done)
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("validation", "loss")):
        assert run.metrics(kind, key) == calm.metrics(kind, key)
