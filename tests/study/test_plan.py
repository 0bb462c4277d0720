"""The runs that follow from a study's file, and the mistakes in one."""

from typing import Any

import pytest

from tests.conftest import Run, fail, tostlm
from tests.study.common import CROSS, SOFTMAX, study_of, write_study
from tostlm.model import count_body_parameters
from tostlm.study.plan import Cell, cell_config, cells


def test_every_arm_is_searched_and_run_once_a_seed(run: Run) -> None:
    arms = {"softmax": SOFTMAX, "cross": {**CROSS, "seeds": [5], "lrs": [3e-3], "steps": 5}}
    study = study_of(run, arms=arms)
    assert [cell.name for cell in cells(study)] == [
        "softmax/search-lr0.001",
        "softmax/search-lr0.01",
        "softmax/seed0",
        "cross/seed5",  # no search for its one learning rate
        "softmax/seed1",
    ]
    configs = {cell.name: cell_config(study, cell, cell.lr) for cell in cells(study)}
    search, final, short = (configs[name] for name in ("softmax/search-lr0.001", "softmax/seed1", "cross/seed5"))
    assert (search.seed, final.seed, short.seed) == (7, 1, 5)
    assert (search.train.steps, final.train.steps, short.train.steps) == (4, 6, 5)
    assert search.optimizer.warmup_steps == 1  # of 4 steps, as 2 are of 6
    assert (search.optimizer.lr, short.optimizer.lr) == (1e-3, 3e-3)
    assert search.optimizer.min_lr == pytest.approx(1e-4)
    assert final.run_dir == study.study_dir / "softmax/seed1"


def test_every_size_runs_every_arm(run: Run) -> None:
    study = study_of(run, sizes={"small": {"model.depth": 1}, "large": {"model.depth": 3}}, search=None, seeds=[0])
    names = ["small/softmax/seed0", "small/cross/seed0", "large/softmax/seed0", "large/cross/seed0"]
    assert [cell.name for cell in cells(study)] == names
    assert cell_config(study, Cell("final", "large", "cross", 0, None), None).model.depth == 3


def test_a_search_may_be_all_that_is_asked(run: Run) -> None:
    study = study_of(run, seeds=[], evaluation=None, sizes={"small": {"model.depth": 1}})
    rates = ("search-lr0.001", "search-lr0.01")
    assert [cell.name for cell in cells(study)] == [f"small/{arm}/{r}" for arm in ("softmax", "cross") for r in rates]


def test_arms_are_as_large_as_the_reference(run: Run) -> None:
    arms = {"softmax": SOFTMAX, "cross": CROSS, "swiglu": {"set": {**CROSS["set"], "model.mlp": "swiglu"}}}
    study = study_of(run, arms=arms)
    sizes = {
        arm: count_body_parameters(cell_config(study, Cell("final", "", arm, 0, None), None).model) for arm in arms
    }
    for arm in arms:
        assert sizes[arm] == pytest.approx(sizes["softmax"], rel=0.01), arm
    loose = study_of(run, arms=arms, match_parameters=False)
    assert cell_config(loose, Cell("final", "", "cross", 0, None), None).model.mlp_width is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"referense": "x"}, "referense is an unknown key; the nearest is reference"),
        ({"reference": "gpt"}, "reference 'gpt' is not one of the arms, softmax, cross"),
        ({"arms": {"a/b": {}}, "reference": "a/b"}, "'a/b' must be letters"),
        ({"arms": {"report.md": SOFTMAX}, "reference": "report.md"}, "not begin like a report's file"),
        ({"arms": {"softmax": {"set": {"model.widht": 3}}}}, "model.widht is an unknown key"),
        ({"sizes": {"small": {"model.width": -1}}}, "arm softmax of size small: "),
        ({"search": {"lrs": [1e-3, 1e-2], "steps": 4, "seed": 2**70}}, "arm softmax: "),
        ({"search": None, "arms": {"softmax": {"lrs": [1.0]}}}, "lrs of an arm go with search"),
        ({"evaluation": None}, "seeds go with evaluation"),
        ({"seeds": "all"}, "seeds='all'"),
        ({"seeds": [0, -1, 1]}, "seeds.1=-1"),
        ({"evaluation": {"contexts": []}}, "evaluation.contexts=[]"),
        ({"evaluation": {"contexts": [1, 32]}}, "evaluation.contexts.0=1"),
        ({"search": {"lrs": [], "steps": 4}}, "search.lrs=[]"),
        ({"arms": {"softmax": {"lrs": []}}}, "arms.softmax.lrs=[]"),
        ({"tasks": {"r": {"kind": "recall", "tokens": 16, "pairs": 2, "lengths": []}}}, "tasks.r.lengths=[]"),
        (
            {"tasks": {"r": {"kind": "recall", "tokens": 16, "pairs": 5}}},
            "5 pairs, and as many questions, need 20 tokens",
        ),
        ({"tasks": {"r": {"kind": "sums", "tokens": 16}}}, "tasks.r.kind='sums'"),
        (
            {
                "set": {"model.positions": 64},
                "tasks": {"r": {"kind": "recall", "tokens": 16, "lengths": [8], "pairs": 2}},
            },
            "has 64 positions, and a task 128 tokens",
        ),
        ({"seeds": [], "evaluation": None, "search": None}, "neither seeds, tasks nor search"),
        ({"sizes": {}}, "sizes={}"),
        ({"arms": {"": SOFTMAX}, "reference": ""}, "'' must be letters"),
        ({"seeds": [1, 1]}, "2 runs would be in the folder softmax/seed1"),
        ({"base": "nowhere.yaml"}, "config nowhere.yaml is neither a file nor a shipped config"),
        ({"arms": {"softmax": {}, "a": {"set": {"model.depth": 20}}}}, "no MLP width gives it the reference's"),
    ],
)
def test_mistakes(run: Run, keys: dict[str, Any], words: str) -> None:
    fail(tostlm("study", str(write_study(run, **keys))), words)


def test_not_a_study(run: Run) -> None:
    fail(tostlm("study", "nowhere.yaml"), "study nowhere.yaml cannot be read")
    file = write_study(run)
    file.write_text("- 1")
    fail(tostlm("study", str(file)), "must be a mapping of keys")
