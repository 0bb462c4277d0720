"""The report's numbers, against a study's made-up results."""

import json
import statistics

import pytest

from tests.conftest import Run
from tests.study.common import study_of
from tostlm.data import Manifest
from tostlm.errors import UserError
from tostlm.study.measure import largest_gradient
from tostlm.study.plan import Cell, Study, cell_config
from tostlm.study.report import Mean, share_of_tokens, write_report
from tostlm.study.results import (
    RESULT,
    Result,
    best_lr,
    evaluation_of,
    read_result,
    require_same_settings,
    settings_of,
    write_result,
)


def finish(study: Study, arm: str, seed: int, loss: float, lr: float | None = None) -> None:
    cell = Cell("final", "", arm, seed, None)
    config = cell_config(study, cell, lr)
    contexts = {"32": loss + 0.1, "64": loss}
    validation = [[3, 1536, loss + 1], [6, 3072, loss]]
    result = Result(
        lr=config.optimizer.lr,
        settings=settings_of(study, cell, config),
        loss=loss,
        tokens=3072,
        flops_per_token=1e6,
        body_parameters=25_000,
        contexts=contexts,
        validation=validation,
        largest_gradient=[2.0 + seed, 3],
        evaluation=evaluation_of(study, cell),
        repetition={"first": [9.0, 4], "1-64": [loss, 2]},
    )
    write_result(study, cell, result)


def test_the_mean_and_its_interval() -> None:
    assert Mean.of([4.0]) == Mean(4.0, None)
    mean = Mean.of([4.0, 4.2, 4.6])
    assert mean.value == pytest.approx(statistics.fmean([4.0, 4.2, 4.6]))
    assert Mean.of([0.0, 2.0] * 6).half == pytest.approx(2.201 * statistics.stdev([0.0, 2.0] * 6) / 12**0.5, rel=1e-3)
    assert mean.half == pytest.approx(4.303 * statistics.stdev([4.0, 4.2, 4.6]) / 3**0.5)


def test_a_report_of_what_is_finished(run: Run) -> None:
    study = study_of(run, search=None)
    write_report(study)
    assert json.loads((study.study_dir / "report.json").read_text())["final"] == []
    for arm, losses in {"softmax": [4.0, 4.4], "cross": [3.9, 4.3]}.items():
        for seed, loss in enumerate(losses):
            finish(study, arm, seed, loss)
    write_report(study)
    softmax, cross = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (study.study_dir / "report.md").read_text().splitlines()
        if line.startswith(("| softmax", "| cross"))
    ][:2]
    assert softmax[0] == "softmax" and softmax[5] == ""
    # By seed cross is 0.1 ahead both times, although the means' intervals overlap.
    assert cross[4].startswith("4.100 ± ") and cross[5] == "-0.100 ± 0.000"
    # From 1 above after half of the tokens to 0.1 below at the end.
    assert cross[6] == "0.950 ± 0.000" and softmax[6] == ""
    assert cross[7].startswith("4.200 ± ") and cross[8].startswith("4.100 ± ")
    assert cross[-1] == "3.0"
    assert "| cross | 9.000 ± 0.000 | 4.100 ± 2.542 |" in (study.study_dir / "report.md").read_text()
    for name in ("loss-by-context", "loss-by-tokens", "loss-by-flops"):
        assert (study.study_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_tokens_to_the_references_loss() -> None:
    reference = Result(1e-3, {}, loss=4.0, tokens=1000)
    falling = [[1, 250, 6.0], [2, 500, 5.0], [3, 750, 3.0], [4, 1000, 2.0]]
    assert share_of_tokens(Result(1e-3, {}, loss=2.0, validation=falling), reference) == 0.625
    assert share_of_tokens(Result(1e-3, {}, loss=5.0, validation=falling[:2]), reference) is None
    assert share_of_tokens(Result(1e-3, {}, loss=2.0, validation=falling[3:]), reference) == 1.0


def test_the_best_rate_is_that_of_the_lowest_loss(run: Run) -> None:
    study = study_of(run)
    final = Cell("final", "", "cross", 0, None)
    for lr, loss in ((1e-3, 5.0), (1e-2, None)):
        cell = Cell("search", "", "cross", 7, lr)
        settings = settings_of(study, cell, cell_config(study, cell, lr))
        write_result(study, cell, Result(lr, settings, loss))
        assert read_result(study, cell) is not None
    assert best_lr(study, final) == 1e-3
    write_report(study)
    report = (study.study_dir / "report.md").read_text()
    assert report.startswith("Losses after 4 steps at each learning rate searched")
    assert "| learning rate | 0.001 | 0.01 |" in report
    assert "| cross | **5.000** | diverged |" in report
    assert (study.study_dir / "loss-by-lr.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_of_other_settings_are_not_mixed_in(run: Run) -> None:
    study = study_of(run, search=None)
    finish(study, "cross", 0, 4.0)
    require_same_settings(study)
    for key, value in (("optimizer.weight_decay", 0.2), ("deepspeed.bf16", {"enabled": True})):
        changed = study_of(run, search=None, set={key: value, "train.eval_every_steps": 3, "model.positions": None})
        with pytest.raises(UserError, match=r"cross/seed0 is finished with .* and the study now says"):
            require_same_settings(changed)


def test_what_a_later_version_added_is_at_its_default_in_earlier_results(run: Run) -> None:
    study = study_of(run, search=None)
    finish(study, "cross", 0, 4.0)
    file = study.study_dir / "cross/seed0" / RESULT
    result = json.loads(file.read_text())
    result["settings"]["config"] = result["settings"]["config"].replace("  name: adamw\n", "")
    file.write_text(json.dumps(result))
    require_same_settings(study)
    muon = study_of(run, search=None, set={"optimizer.name": "muon", "train.eval_every_steps": 3})
    with pytest.raises(UserError, match="cross/seed0 is finished with name: adamw, and the study now says name: muon"):
        require_same_settings(muon)
    result["settings"]["config"] = "optimiser: sgd\n"
    file.write_text(json.dumps(result))
    with pytest.raises(UserError, match="cross/seed0 is finished with optimiser: sgd, and the study now says"):
        require_same_settings(study)


def test_a_better_rate_found_later_is_not_mixed_in(run: Run) -> None:
    study = study_of(run)
    finish(study, "cross", 0, 4.0, 1e-3)
    for lr, loss in ((1e-3, 5.0), (1e-2, 4.5)):
        require_same_settings(study)
        cell = Cell("search", "", "cross", 7, lr)
        settings = settings_of(study, cell, cell_config(study, cell, lr))
        write_result(study, cell, Result(lr, settings, loss))
    with pytest.raises(UserError, match=r"cross/seed0 is finished with learning rate 0.001, and its best is now 0.01"):
        require_same_settings(study)


def test_runs_on_other_tokens_are_not_mixed_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(run, search=None)
    finish(study, "cross", 0, 4.0)
    monkeypatch.setattr(Manifest, "content_sha256", "that of others in the same folder")
    with pytest.raises(UserError, match=r"finished with content_sha256: .* now says content_sha256: that of others"):
        require_same_settings(study)


def test_a_run_is_measured_again_where_other_contexts_are_asked_for(run: Run) -> None:
    study = study_of(run, search=None)
    finish(study, "cross", 0, 4.0)
    cell = Cell("final", "", "cross", 0, None)
    assert read_result(study, cell) is not None
    assert read_result(study_of(run, search=None, evaluation={"contexts": [32, 128]}), cell) is None


@pytest.mark.parametrize("damage", [{"loss": "low"}, {"contexts": [1]}, {"answers": {"64": 1}}, {"lr": None}], ids=str)
def test_damaged_results_are_named(run: Run, damage: dict[str, object]) -> None:
    study = study_of(run)
    finish(study, "softmax", 0, 3.0)
    file = study.study_dir / "softmax/seed0" / RESULT
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(UserError, match="is damaged; remove it, and the run is measured again"):
        write_report(study)


def test_the_largest_gradient_is_beside_those_before_it() -> None:
    norms = [(step, 2.0 if step != 70 else 30.0) for step in range(1, 100)]
    assert largest_gradient(norms) == [15.0, 70]
    assert largest_gradient(norms[:5]) == []


def test_tasks_have_a_table_of_their_own(run: Run) -> None:
    study = study_of(run, search=None, tasks={"pairs-2": {"kind": "recall", "tokens": 16, "pairs": 2}})
    cell = Cell("task", "", "cross", 0, None, "pairs-2")
    config = cell_config(study, cell, None)
    result = Result(1e-3, settings_of(study, cell, config), 0.1, answers={"16": (0.75, 0.1), "64": (0.5, None)})
    write_result(study, cell, result)
    require_same_settings(study)
    write_report(study)
    report = (study.study_dir / "report.md").read_text()
    assert "| task, tokens | pairs-2, 16 | pairs-2, 64 |" in report
    assert "| cross | 75.0 | diverged |" in report
    json.loads((study.study_dir / "report.json").read_text(), parse_constant=pytest.fail)
    harder = study_of(run, search=None, tasks={"pairs-2": {"kind": "recall", "tokens": 16, "pairs": 3}})
    with pytest.raises(UserError, match="cross/task-pairs-2 is finished with"):
        require_same_settings(harder)
