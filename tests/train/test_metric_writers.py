"""Where numbers are written: damaged files, clocks and full disks; no failure of Weights & Biases ends a run."""

import logging
import re
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tests.conftest import Run, fail, succeed, tostlm
from tests.train.test_faults import harm
from tests.warm import Program
from tostlm.errors import UserError
from tostlm.launch import RankInfo
from tostlm.launch.local import rank_env
from tostlm.train import metric_writers
from tostlm.train.batches import open_data
from tostlm.train.metrics import Metrics, PhaseTimers
from tostlm.train.trainer import check_run

KEYLESS = {"WANDB_MODE": "online", "WANDB_API_KEY": ""}


def test_without_the_library_no_run_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = open_data(run.config(), 1)
    check_run(run.config(), data)
    with pytest.raises(UserError, match=r"train.wandb_project tost needs .* pip install 'tostlm\[wandb\]'"):
        check_run(run.config("train.wandb_project=tost"), data)


def test_without_a_key_no_run_starts(run: Run, tmp_path: Path) -> None:
    result = tostlm("train", str(run.file), "train.wandb_project=tost", HOME=str(tmp_path), **KEYLESS)
    fail(result, "train.wandb_project tost needs an API key", "wandb login", "WANDB_MODE=offline")


def test_a_service_that_does_not_answer_is_logged(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    run.dir.mkdir()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(metric_writers, "WANDB_START_SECONDS", 1)
    config = run.config("train.wandb_project=tost")
    try:
        with caplog.at_level(logging.WARNING, "tostlm"):
            metric_writers.check_wandb(config)
            with Metrics(config, 0, RankInfo(0, 0, 1), PhaseTimers(torch.device("cpu"))) as metrics:
                metrics.validation(1, {"loss": 2.0})
    finally:
        wandb.teardown()
    assert run.metrics("validation") == {1: 2.0}
    (warning,) = (entry for entry in caplog.records if entry.name == metric_writers.__name__)
    assert warning.message.startswith("the run continues without Weights & Biases: ")
    assert capfd.readouterr().err == ""


def test_lines_that_cannot_be_read_are_put_aside(run: Run) -> None:
    succeed(run.train("train.steps=3"))
    good = run.metrics("train")
    with (run.dir / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"kind": "train", "st')
    succeed(run.train())
    assert {step: loss for step, loss in run.metrics("train").items() if step <= 3} == good
    assert list(run.metrics("train")) == list(range(1, 7))
    assert (run.dir / "metrics.jsonl.damaged").read_bytes() == b'\xff\xfe\n[1]\n{"kind": "train", "st\n'


def test_steps_are_shown_though_the_clock_was_set_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.dir.mkdir()
    real, day = time.time, 86_400
    for first, ahead in ((0, 2 * day), (2, day), (4, 0)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
        writer = metric_writers.MetricsWriter(run.config(), first)
        for step in range(first + 1, first + 4):  # the last one is of a step that is made again
            writer.write("train", step, {"loss": float(step)})
        writer.close(failed=False)
    names = sorted(path.name for path in (run.dir / "tensorboard").iterdir())
    assert [name.split(".")[3][:5] for name in names[:2]] == ["00000", "00000"]
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_losses_at_all_contexts_are_charts_of_their_own(run: Run) -> None:
    run.dir.mkdir()
    losses = {"loss": 3.0, "loss_at_16": 3.2, "loss_at_160": 3.1, "loss_at_16/web": 3.3, "ema/loss_at_16": 3.0}
    for first in (0, 2):  # and again after a resume, which may evaluate at other contexts
        writer = metric_writers.MetricsWriter(run.config(), first)
        writer.write("train", first + 1, {"loss": 3.0})
        for step in (first + 1, first + 2):
            writer.write("validation", step, losses)
        writer.close(failed=False)
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    found = events.Tensors("custom_scalars__config__")
    assert len(found) == 2
    layout = Layout.FromString(found[-1].tensor_proto.string_val[0])
    (category,) = layout.category
    scalars = events.Tags()["scalars"]
    assert {
        chart.title: [tag for tag in scalars for pattern in chart.multiline.tag if re.match(pattern, tag)]
        for chart in category.chart
    } == {
        "validation/loss by context": ["validation/loss_at_16", "validation/loss_at_160"],
        "validation/loss by context/web": ["validation/loss_at_16/web"],
        "validation/ema/loss by context": ["validation/ema/loss_at_16"],
    }


def fill(disk: Path, engine: object) -> None:
    """Leave no room on a disk."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_while_reporting_names_the_file(small_disk: Path, run: Run) -> None:
    (place,) = rank_env(1)
    spoil = partial(harm, 3, partial(fill, small_disk))
    options = [f"run_dir={small_disk}/run", "train.steps=5000", "train.save_every_steps=5000"]
    fail(Program("train", str(run.file), *options, before=spoil, **place).end(), "No space left on device", "/run/")
