"""Faults of numbers and requests to stop, injected into real runs."""

import copy
import json
import math
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest

from tests.conftest import Run, fail, succeed
from tests.warm import Program
from tostlm.checkpoint import checkpoints, load_checkpoint, read_train_state, rollback, step_of
from tostlm.errors import EXIT_REQUEUE
from tostlm.launch.local import rank_env
from tostlm.train import trainer
from tostlm.train.engine import StepResult


def harm(numbers: int | range, fault: Callable[[Any], Any]) -> None:
    """Have `fault(engine)` happen to this process in some steps; what it returns is taken away after each of them."""
    steps, train_step = count(1), trainer.train_step
    numbers = range(numbers, numbers + 1) if isinstance(numbers, int) else numbers

    def faulty(engine: Any, *arguments: Any) -> StepResult:
        hook = fault(engine) if next(steps) in numbers else None
        step = train_step(engine, *arguments)
        if hook is not None:
            hook.remove()
        return step

    trainer.train_step = faulty


def nan_loss(engine: Any) -> Any:
    return engine.module.register_forward_hook(lambda module, inputs, out: (out[0] * math.nan, out[1]))


def high_loss(engine: Any) -> Any:
    return engine.module.register_forward_hook(lambda module, inputs, out: (out[0] + 3, out[1]))


def lost_weights(engine: Any) -> None:
    engine.module.embed.weight.data.fill_(math.nan)


def train_with(
    fault: Callable[[Any], Any], numbers: int | range, run: Run, *overrides: str
) -> subprocess.CompletedProcess[str]:
    """Train on one rank that steps `numbers` of this process go wrong in."""
    (place,) = rank_env(1)
    return Program("train", str(run.file), *overrides, before=partial(harm, numbers, fault), **place).end()


def events(run: Run) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "event"]


def test_a_step_without_a_finite_loss_is_skipped(run: Run) -> None:
    output = succeed(train_with(nan_loss, 4, run))
    assert read_train_state(checkpoints(run.dir)[-1])[:2] == (6, 6)
    assert read_train_state(checkpoints(run.dir)[-1]).skipped_steps == 1
    assert [(event["step"], event["event"]) for event in events(run)] == [(4, "skipped")]
    assert "skipped" in output
    assert run.metrics("train", "skipped_steps") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    assert all(p.isfinite().all() for p in load_checkpoint(run.dir).lm.parameters())


BACK = ("train.bad_steps_before_rollback=2", "train.save_every_steps=2", "train.steps=8")


def test_a_run_that_has_gone_bad_goes_back_and_leaves_the_data_out(run: Run) -> None:
    succeed(train_with(lost_weights, 5, run, *BACK))
    state = read_train_state(checkpoints(run.dir)[-1])
    assert (state.step, state.data_step) == (8, 10)  # steps 5 and 6 of the data were left out
    assert (state.skipped_steps, state.rollbacks) == (2, 1)
    assert list(run.metrics("train")) == list(range(1, 9))
    assert [(event["step"], event["event"]) for event in events(run)] == [
        (5, "skipped"),
        (6, "skipped"),
        (4, "rolled back"),
    ]
    assert all(math.isfinite(loss) for loss in run.metrics("train").values())
    assert all(p.isfinite().all() for p in load_checkpoint(run.dir).lm.parameters())
    # What follows is what a run does that is told to leave these data out.
    losses = run.metrics("train")
    for path in checkpoints(run.dir)[2:]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    newest = checkpoints(run.dir)[-1]
    assert read_train_state(newest).step == 4
    succeed(train_with(lost_weights, 1, run, *BACK))  # the first two steps after step 4, again
    assert run.metrics("train") == losses


def test_a_run_that_ends_badly_keeps_what_was_good(run: Run) -> None:
    ended = train_with(lost_weights, 6, run, "train.keep_last_checkpoints=1", "train.eval_every_steps=100")
    fail(ended, "the validation loss of the last step, 6, is not finite", "it resumes from the newest checkpoint")
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000003"]
    succeed(run.train("train.keep_last_checkpoints=1"))
    assert all(math.isfinite(loss) for loss in run.metrics("validation").values())


def elsewhere(run: Run, name: str) -> Run:
    """The same run in another folder."""
    other = copy.copy(run)
    other.dir = run.dir.with_name(name)
    return other


def bad_twice_then_killed() -> None:
    harm(range(5, 7), nan_loss)
    harm(7, lambda engine: os.kill(os.getpid(), signal.SIGKILL))


def test_a_kill_after_a_rollback_does_not_undo_it(run: Run) -> None:
    calm = elsewhere(run, "calm")
    (place,) = rank_env(1)
    succeed(train_with(nan_loss, range(5, 7), run, *BACK, f"run_dir={calm.dir}"))
    killed = Program("train", str(run.file), *BACK, before=bad_twice_then_killed, **place).end()
    assert killed.returncode == -signal.SIGKILL
    assert (run.dir / "checkpoints" / rollback.RECORD).exists()
    succeed(run.train(*BACK))
    assert read_train_state(checkpoints(run.dir)[-1])[:5] == read_train_state(checkpoints(calm.dir)[-1])[:5]
    assert run.metrics("train") == calm.metrics("train")
    assert not (run.dir / "checkpoints" / rollback.RECORD).exists()


def test_a_rollback_that_fails_goes_one_checkpoint_further_back(run: Run) -> None:
    """Steps 5 and 6 are bad, and again from the checkpoints of steps 4 and 3; from that of step 2 on all is well."""
    often = [*BACK, "train.save_every_steps=1"]
    result = train_with(nan_loss, range(5, 11), run, *often)
    succeed(result)
    state = read_train_state(checkpoints(run.dir)[-1])
    assert (state.step, state.data_step, state.rollbacks) == (8, 16, 3)
    assert [path.name for path in checkpoints(run.dir)] == [f"step-{step:08d}" for step in range(1, 9)]
    (passed_over,) = (run.dir / "checkpoints").glob("*.passed-over")
    assert passed_over.name == "step-00000004.passed-over"
    assert f"{passed_over.name}: the run continues from step 2" in result.stderr
    assert load_checkpoint(passed_over).train_state.step == 4  # it stays usable


def test_a_trouble_that_stays_puts_no_checkpoint_aside(run: Run) -> None:
    """The loss is too high in every step from the fifth on, whatever weights and data it is of."""
    spikes = ["train.spike_zscore=3", "train.spike_window_steps=3", "train.save_every_steps=1", *BACK[::2]]
    ended = train_with(high_loss, range(5, 1000), run, *spikes)
    fail(ended, "after 3 rollbacks (train.rollbacks_before_stop)", "it resumes from the newest checkpoint")
    names = [path.name for path in (run.dir / "checkpoints").iterdir() if path.name != "latest"]
    assert sorted(names) == [f"step-{step:08d}" for step in range(1, 5)]
    succeed(run.train(*spikes))
    assert list(run.metrics("train")) == list(range(1, 9))


def test_a_run_that_goes_bad_again_and_again_stops(run: Run) -> None:
    diverges = ("optimizer.lr=1e30", "optimizer.warmup_steps=0", "train.steps=50", "train.bad_steps_before_rollback=2")
    line = fail(run.train(*diverges, "train.save_every_steps=1"), "training has diverged; lower optimizer.lr")
    assert "the last 2 losses or gradients up to step 3 were bad and there is no checkpoint to roll back to" in line
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000001"]
    limited = run.train(*diverges, "train.rollbacks_before_stop=0", f"run_dir={run.dir}2")
    fail(limited, "after 0 rollbacks (train.rollbacks_before_stop)", "training has diverged")


def asked_before_a_bad_step(engine: Any) -> Any:
    """The request arrives in the fourth step, and the fifth is bad."""
    os.kill(os.getpid(), signal.SIGTERM)
    harm(1, nan_loss)


@pytest.mark.parametrize(("bad_steps", "saved"), [(5, 6), (1, 3)])
def test_asked_to_stop_in_a_bad_step_nothing_is_lost(run: Run, bad_steps: int, saved: int) -> None:
    """The next good step is saved, or the rollback recorded: the same command continues as if never stopped."""
    options = (f"train.bad_steps_before_rollback={bad_steps}", "train.steps=9")
    stopped = train_with(asked_before_a_bad_step, 4, run, *options)
    assert stopped.returncode == EXIT_REQUEUE, stopped.stderr
    assert step_of(checkpoints(run.dir)[-1]) == saved
    succeed(run.train(*options))
    calm = elsewhere(run, "calm")
    succeed(train_with(nan_loss, 5, run, *options, f"run_dir={calm.dir}"))
    assert run.metrics("train") == calm.metrics("train")


def test_a_spike_is_skipped_where_that_is_asked_for(run: Run) -> None:
    spikes = ("train.spike_zscore=3", "train.spike_window_steps=3")
    succeed(train_with(high_loss, 5, run, *spikes))
    assert [(event["step"], event["event"]) for event in events(run)] == [(5, "skipped")]
    calm = run.metrics("train")
    run.dir = run.dir.with_name("calm")
    succeed(train_with(high_loss, 5, run, f"run_dir={run.dir}"))
    assert not events(run)
    assert run.metrics("train")[5] == calm[5]  # the same step, taken instead
    assert run.metrics("train")[6] != calm[6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_the_step_it_is_at(run: Run, number: signal.Signals) -> None:
    program = run.start("train.steps=100000", "train.save_every_steps=50000", nproc=2)
    while "step 7/" not in program.stdout:
        assert program.running()
        time.sleep(0.05)
    program.send_signal(number)
    ended = program.end(60)
    assert (ended.returncode, ended.stderr) == (EXIT_REQUEUE, "")
    (saved,) = checkpoints(run.dir)
    step = read_train_state(saved).step
    assert f"stopped after step {step} of 100000 ({number.name}" in ended.stdout
    assert max(run.metrics("train")) == step  # nothing done is lost
    succeed(run.train(f"train.steps={step + 2}", nproc=2))
    assert list(run.metrics("train")) == list(range(1, step + 3))


def test_the_time_it_was_given(run: Run) -> None:
    result = run.train("train.steps=100000", "train.save_every_steps=50000", "train.time_limit_minutes=0.02")
    assert result.returncode == EXIT_REQUEUE
    assert "train.time_limit_minutes" in result.stdout
    assert len(checkpoints(run.dir)) == 1


def limit_file_sizes(engine: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def test_a_file_larger_than_the_user_may_write(run: Run) -> None:
    fail(train_with(limit_file_sizes, 5, run), "File too large", "free or choose another place and try again")
    succeed(run.train())
    assert list(run.metrics("train")) == list(range(1, 7))


def without_bf16() -> None:
    trainer.supports_matmul = lambda device, dtype: False


def test_bf16_on_a_device_without_it(run: Run) -> None:
    (place,) = rank_env(1)
    bf16 = ["train", str(run.file), "deepspeed.bf16.enabled=true"]
    result = Program(*bf16, before=without_bf16, **place).end()
    fail(result, "precision is bf16, which", "cannot multiply in; train in another")
