"""A study runs its models, survives kills, and divides its runs among workers."""

import json
import signal
import time
from pathlib import Path

from tests.conftest import Run, fail, succeed, tostlm
from tests.study.common import CROSS, SOFTMAX, study_of, write_study
from tests.warm import Program
from tostlm.data import PreparationSettings, prepare, train_tokenizer
from tostlm.errors import EXIT_REQUEUE
from tostlm.study.run import _is_held

ARMS = {"softmax": {**SOFTMAX, "lrs": [1e-2]}, "cross": {**CROSS, "lrs": [1e-2, 1e9]}}


def test_a_study_that_is_killed_goes_on_and_is_compared(run: Run) -> None:
    """At the rate of 1e9 training diverges, which is a result of the search and no failure."""
    file = write_study(run, arms=ARMS, seeds=[0])
    study = study_of(run, arms=ARMS, seeds=[0])
    first = Program("study", str(file))
    while not (study.study_dir / "softmax/seed0/metrics.jsonl").exists():
        assert first.running()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.end()
    assert "finished" not in succeed(tostlm("study", str(file), "--status"))
    printed = succeed(tostlm("study", str(file), "--workers", "2"))
    states = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if "/se" in line and "==" not in line}
    assert states["cross/search-lr1e+09"][0] == "diverged"
    assert {name for name, state in states.items() if state[0] == "finished"} == {
        "cross/search-lr0.01",
        "softmax/seed0",
        "cross/seed0",
    }
    report = json.loads((study.study_dir / "report.json").read_text())
    for result in report["final"]:
        assert result["lr"] == 1e-2
        assert result["loss"] < result["validation"][0][2]
        assert result["contexts"].keys() == {"32", "64"}
        assert len(result["largest_gradient"]) in (0, 2)
    written = (study.study_dir / "cross/seed0/result.json").stat().st_mtime_ns
    succeed(tostlm("study", str(file)))
    assert (study.study_dir / "cross/seed0/result.json").stat().st_mtime_ns == written


def test_a_study_that_is_asked_to_stop_as_a_run_ends_starts_no_other(run: Run) -> None:
    file = write_study(run, arms={"softmax": SOFTMAX, "cross": CROSS}, seeds=[0], search=None)
    study = study_of(run, arms={"softmax": SOFTMAX, "cross": CROSS}, seeds=[0], search=None)
    program = Program("study", str(file))
    metrics, last = study.study_dir / "softmax/seed0/metrics.jsonl", f'"validation", "step": {run.config().train.steps}'
    while not (metrics.exists() and last in metrics.read_text()):
        assert program.running()
        time.sleep(0.01)
    program.send_signal(signal.SIGTERM)
    program.end()
    assert not (study.study_dir / "cross/seed0/metrics.jsonl").exists()


def test_a_study_that_is_asked_to_stop_stops_all_its_workers(run: Run) -> None:
    arms = {"softmax": SOFTMAX, "cross": CROSS}
    keys = {"train.eval_every_steps": 1000, "train.steps": 1000, "model.positions": None}
    file = write_study(run, arms=arms, seeds=[0, 1], search=None, set=keys)
    study = study_of(run, arms=arms, seeds=[0, 1], search=None, set=keys)
    program = Program("study", str(file), "--workers", "2")
    metrics = [study.study_dir / name / "metrics.jsonl" for name in ("softmax/seed0", "cross/seed0")]
    while not all(path.exists() and '"step": 2' in path.read_text() for path in metrics):
        assert program.running()
        time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    assert program.end().returncode == EXIT_REQUEUE
    assert not list(study.study_dir.glob("*/seed1/metrics.jsonl"))
    assert not any(_is_held(path.parent) for path in metrics)


def test_a_run_without_its_last_loss_fails_and_is_named(run: Run) -> None:
    file = write_study(run, arms={"softmax": SOFTMAX}, seeds=[0], search=None)
    folder = study_of(run, arms={"softmax": SOFTMAX}, seeds=[0], search=None).study_dir / "softmax/seed0"
    succeed(tostlm("study", str(file)))
    (folder / "result.json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text(
        "".join(line for line in metrics.read_text().splitlines(True) if '"validation", "step": 6' not in line)
    )
    fail(tostlm("study", str(file)), "softmax/seed0: ", "has no loss of the last step; remove")


def test_a_run_that_fails_is_named_and_the_others_go_on(run: Run) -> None:
    arms = {"softmax": SOFTMAX, "cross": {"set": {**CROSS["set"], "model.vocab_size": 100}}}
    file = write_study(run, arms=arms, seeds=[0], search=None)
    result = tostlm("study", str(file))
    assert result.returncode == 2
    assert "cross/seed0: training failed with exit code 2" in result.stderr
    states = succeed(tostlm("study", str(file), "--status"))
    assert [line.split()[:2] for line in states.splitlines()[1:4] if "seed" in line] == [
        ["softmax/seed0", "finished"],
        ["cross/seed0", "failed"],
    ]


def test_mistakes_come_before_any_run(run: Run) -> None:
    file = write_study(run, evaluation={"contexts": [64, 1_000_000]})
    fail(tostlm("study", str(file)), "is longer than 1000000 tokens")


def test_another_tokenizer_is_noticed_before_any_run(
    run: Run, corpus: Path, speeches: list[str], tmp_path: Path
) -> None:
    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2), other, tmp_path / "other")
    file = write_study(run, evaluation={"data": str(tmp_path / "other"), "contexts": [32]})
    fail(tostlm("study", str(file)), "other was prepared with another tokenizer than")
    assert not study_of(run).study_dir.exists()
