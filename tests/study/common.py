"""A small study of two models."""

from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Run
from tostlm.study import Study, load_study

SOFTMAX = {"set": {"model.layers": [{"mixer": "softmax", "rotary_base": 100}]}}
CROSS = {"set": {"model.layers": [{"mixer": "tssa_cross"}]}}


def write_study(run: Run, **keys: Any) -> Path:
    content = {
        "study_dir": str(run.dir.parent / "study"),
        "base": str(run.file),
        "set": {"train.eval_every_steps": 3, "model.positions": None},
        "arms": {"softmax": SOFTMAX, "cross": CROSS},
        "reference": "softmax",
        "seeds": [0, 1],
        "search": {"lrs": [1e-3, 1e-2], "steps": 4, "seed": 7},
        "evaluation": {"contexts": [32, 64], "windows": 3},
        **keys,
    }
    file = run.dir.parent / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def study_of(run: Run, **keys: Any) -> Study:
    return load_study(write_study(run, **keys))
