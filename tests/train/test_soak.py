"""Killed at random, twenty times or in another way of training four, a run ends as the run that was never killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import Run, succeed
from tests.train.run_helpers import REPORTED, VARIANTS
from tostlm.checkpoint import checkpoints, read_train_state, step_of
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE

OVERRIDES = ["train.save_every_steps=5", "train.keep_last_checkpoints=3", "train.eval_every_steps=20"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("variant", "kills"), [([], 20), *((variant, 4) for variant in VARIANTS.values())])
def test_killed_at_random(data: Path, tmp_path: Path, variant: list[str], kills: int) -> None:
    options = [*OVERRIDES, *variant, f"train.steps={kills * 40}"]
    (tmp_path / "calm").mkdir()
    calm = Run(tmp_path / "calm", data)
    succeed(calm.train(*options, nproc=2))

    run, chance = Run(tmp_path, data), random.Random(0)
    done = []
    for _ in range(kills):
        before = read_train_state(checkpoints(run.dir)[-1]).step if checkpoints(run.dir) else 0
        program = run.start(*options, nproc=2)
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
    succeed(run.train(*options, nproc=2))
    print(done)
    for kind, key in REPORTED:
        assert run.metrics(kind, key) == calm.metrics(kind, key)
