"""Weights & Biases: asked for without what it needs is a mistake, and nothing of it ever ends a run."""

import logging
import sys
from pathlib import Path

import pytest
import torch
import wandb

from tests.conftest import Run, fail, tostlm
from tostlm.errors import UserError
from tostlm.launch import RankInfo
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
                metrics.validation(1, 2.0)
    finally:
        wandb.teardown()
    assert run.metrics("validation") == {1: 2.0}
    (warning,) = (entry for entry in caplog.records if entry.name == metric_writers.__name__)
    assert warning.message.startswith("the run continues without Weights & Biases: ")
    assert capfd.readouterr().err == ""
