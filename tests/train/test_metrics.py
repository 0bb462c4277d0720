"""A run's report: what a step is worth, and nothing twice."""

import io
import json
import math
import sys
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run
from tostlm.checkpoint import TrainState
from tostlm.config import RunConfig
from tostlm.launch import RankInfo
from tostlm.model import training_flops_per_token
from tostlm.train import metrics
from tostlm.train.engine import StepResult
from tostlm.train.metrics import Metrics, PhaseTimers

ALONE = RankInfo(0, 0, 1)
GROUPS = [{"name": "decay", "lr": 1e-3}, {"name": "no_decay", "lr": 2e-3}]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def lines(run: Run) -> list[dict[str, Any]]:
    content = (run.dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=no_constant) for line in content.splitlines()]


def on_board(run: Run, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def report(
    record: Metrics, step: int, loss: float = 2.0, grad_norm: float | None = 0.5, context: int = 64, skipped: int = 0
) -> None:
    state = TrainState(step=step, skipped_steps=skipped)
    record.log(state, StepResult(loss, grad_norm, False, False, False), 1e-3, GROUPS, context, {"data": 0.25})


def open_metrics(config: RunConfig, start_step: int = 0, ranks: RankInfo = ALONE) -> Metrics:
    return Metrics(config, start_step, ranks, PhaseTimers(torch.device("cpu")))


@pytest.fixture
def run(run: Run) -> Run:
    run.dir.mkdir()
    return run


def test_what_a_step_is_worth(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with open_metrics(run.config(), 0, RankInfo(0, 0, 4)) as record:
        for _ in range(2):
            with record._timers("forward"):
                pass
        with record._timers("save"):
            pass
        report(record, 2, skipped=3)
        report(record, 4)
    line, later = lines(run)
    assert {key: line[key] for key in ("loss", "grad_norm", "epoch", "tokens", "skipped_steps")} == {
        "loss": 2.0,
        "grad_norm": 0.5,
        "epoch": 0.25,
        "tokens": 1024,
        "skipped_steps": 3,
    }
    assert line["perplexity"] == pytest.approx(math.exp(2.0))
    assert (line["lr"], line["lr/decay"], line["lr/no_decay"]) == (1e-3, 1e-3, 2e-3)
    assert line["memory_bytes"] > 10_000_000
    phases = {key: value for key, value in line.items() if key.startswith("seconds/")}
    assert phases.keys() == {"seconds/forward", "seconds/save", "seconds/other"}
    training = phases["seconds/forward"] + phases["seconds/other"]  # a save is no training
    assert line["tokens_per_second"] == pytest.approx(512 / training)
    assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 4)
    assert line["save_seconds"] == later["save_seconds"] == pytest.approx(2 * phases["seconds/save"])
    assert "seconds/save" not in later
    for key in line.keys() - {"kind", "step", "time"}:
        ((step, value), *_) = on_board(run, f"train/{key}")
        assert step == 2, key
        assert value == pytest.approx(line[key]), key
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 2/6  loss 2.0000  lr 1.00e-03  grad 0.50  ")
    assert printed[0].endswith(" tokens/s  skipped 3")
    assert printed[1].endswith(" tokens/s")


@pytest.mark.parametrize("mixer", ["tssa", "softmax"])
def test_mfu_is_of_the_operations_of_the_mixer(run: Run, mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the peak of all devices. TSSA costs the same at any context, softmax C more for each token more."""
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    config = run.config(f"model.layers=[{{mixer: {mixer}}}]")
    with open_metrics(config, 0, RankInfo(0, 0, 4)) as record:
        report(record, 1, context=64)
        report(record, 2, context=64_000)
    short, long = (line["mfu"] * 4e12 / line["tokens_per_second"] for line in lines(run))
    assert short == pytest.approx(training_flops_per_token(config.model, 64))
    quadratic = 3 * 2 * 2 * 32 * (64_000 - 64)  # 3 passes, 2 layers, half of 4 C operations a token seen
    assert long - short == pytest.approx(quadratic if mixer == "softmax" else 0, abs=1e-3)


def test_the_epochs_of_a_blend_go_by_name(run: Run) -> None:
    with open_metrics(run.config(), 0, ALONE) as record:
        result = StepResult(2.0, None, False, False, False)
        record.log(TrainState(step=1), result, 1e-3, GROUPS, 64, {"web": 0.25, "books": 1.5})
    (line,) = lines(run)
    assert (line["epoch/web"], line["epoch/books"]) == (0.25, 1.5)
    assert "epoch" not in line


def test_no_mfu_without_a_known_peak_and_no_norm_where_none_is_made(run: Run) -> None:
    with open_metrics(run.config(), 0, ALONE) as record:
        report(record, 1, grad_norm=None)
    assert len(lines(run)) == 1
    assert not {"mfu", "grad_norm"} & lines(run)[0].keys()


def test_what_is_no_number_is_null_and_on_no_board(run: Run) -> None:
    with open_metrics(run.config(), 0, ALONE) as record:
        report(record, 1, loss=math.nan, grad_norm=math.inf)
        record.validation(1, {"loss": 1e6, "perplexity": math.inf})
        record.event(1, "bad step", loss=-math.inf)
    train, validation, event = lines(run)
    assert [train[key] for key in ("loss", "perplexity", "grad_norm")] == [None] * 3
    assert (validation["loss"], validation["perplexity"]) == (1e6, None)
    assert (event["event"], event["loss"]) == ("bad step", None)
    assert on_board(run, "train/loss") == on_board(run, "validation/perplexity") == []
    assert on_board(run, "validation/loss") == [(1, 1e6)]


def test_a_rewound_record_goes_on_without_doubled_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with open_metrics(run.config(), 0, ALONE) as record:
        for step in (1, 2, 3, 4):
            report(record, step)
        assert len(on_board(run, "train/memory_bytes")) == 4  # on disk at once, for those who are killed
        record.statistics(4, {"entropy/0": 0.5})
        record.event(4, "rollback", to=2)
        record.rewind(2)
        for step in (3, 4, 5):
            report(record, step, loss=1.0)
    assert [(line["kind"], line["step"], line.get("loss")) for line in lines(run)] == [
        ("train", 1, 2.0),
        ("train", 2, 2.0),
        ("event", 4, None),
        ("train", 3, 1.0),
        ("train", 4, 1.0),
        ("train", 5, 1.0),
    ]
    assert on_board(run, "train/loss") == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert on_board(run, "statistics/entropy/0") == []
    assert "step 4/6  rollback  to 2\n" in capsys.readouterr().out
    with open_metrics(run.config(), 0, ALONE):  # a new process keeps events too
        assert [(line["event"], line["to"]) for line in lines(run)] == [("rollback", 2)]


def test_the_bar_shows_the_losses_and_what_was_skipped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with open_metrics(run.config(), 0, ALONE) as record:
        record.validation(1, {"loss": 3.5})
        report(record, 2, skipped=1)
    shown = terminal.getvalue().split("\r")[-2]
    assert "2/6" in shown
    for words in ("loss=2.0000", "validation=3.5000", "skipped=1"):
        assert words in shown


def test_a_resumed_record_forgets_what_came_after_its_checkpoint(run: Run) -> None:
    written = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)]
    (run.dir / "metrics.jsonl").write_text("\n".join(written) + '\n{"kind": "tr')
    with open_metrics(run.config(), 2, ALONE) as record:
        record.validation(3, {"loss": 1.5})
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_other_ranks_are_mute(run: Run) -> None:
    with open_metrics(run.config(), 0, RankInfo(1, 1, 2)) as record:
        report(record, 1)
        record.validation(1, {"loss": 2.0})
        record.statistics(1, {"entropy/0": 0.5})
        record.event(1, "rollback")
        record.rewind(0)
    assert not list(run.dir.iterdir())
