"""A run's record: what a step is worth, and nothing twice."""

import json

import pytest

from tests.conftest import Run
from tostlm.launch import Ranks
from tostlm.model import training_flops_per_token
from tostlm.train import metrics
from tostlm.train.metrics import Metrics


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


def test_mfu_is_of_the_peak_of_all_devices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_peak_flops", lambda: 1e12)
    config = run.config()
    run.dir.mkdir()
    with Metrics(config, 0, Ranks(0, 0, 4)) as record:
        record.train(1, loss=2.0, lr=1e-3, grad_norm=0.5, context=64, epochs={"data": 0.25})
    (line,) = lines(run)
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * training_flops_per_token(config.model, 64) / 4e12)
    assert line["memory_bytes"] > 10_000_000
    assert (line["loss"], line["lr"], line["grad_norm"], line["tokens"]) == (2.0, 1e-3, 0.5, 512)
    assert line["epoch"] == 0.25


def test_the_epochs_of_a_blend_go_by_name(run: Run) -> None:
    run.dir.mkdir()
    with Metrics(run.config(), 0, Ranks(0, 0, 1)) as record:
        record.train(1, loss=2.0, lr=1e-3, grad_norm=None, context=64, epochs={"web": 0.25, "books": 1.5})
    (line,) = lines(run)
    assert (line["epoch/web"], line["epoch/books"]) == (0.25, 1.5)
    assert "epoch" not in line


def test_no_mfu_without_a_known_peak_and_no_norm_where_none_is_made(run: Run) -> None:
    run.dir.mkdir()
    with Metrics(run.config(), 0, Ranks(0, 0, 1)) as record:
        record.train(1, loss=2.0, lr=1e-3, grad_norm=None, context=64, epochs={})
    assert not {"mfu", "grad_norm"} & lines(run)[0].keys()


def test_a_resumed_record_forgets_what_came_after_its_checkpoint(run: Run) -> None:
    run.dir.mkdir()
    written = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)]
    (run.dir / "metrics.jsonl").write_text("\n".join(written) + '\n{"kind": "tr')
    with Metrics(run.config(), 2, Ranks(0, 0, 1)) as record:
        record.heldout(3, 1.5)
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_other_ranks_are_mute(run: Run) -> None:
    with Metrics(run.config(), 0, Ranks(1, 1, 2)) as record:
        record.train(1, 2.0, 1e-3, 0.5, 64, {})
        record.heldout(1, 2.0)
    assert not run.dir.exists()
