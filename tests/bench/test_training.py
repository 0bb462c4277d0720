"""The bench measures what it says; how fast anything is, no test decides."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Run, succeed, tostlm
from tostlm.bench.training import Rate, bench_training, table
from tostlm.config import load_config
from tostlm.model import LM


def test_every_model_at_every_context(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def record(lm: LM, dtype: torch.dtype, sequences: int, context: int) -> float:
        assert dtype == torch.bfloat16
        passes.append((lm.config.layers[0].mixer, lm.config.positions, sequences, context))
        return 0.5

    monkeypatch.setattr("tostlm.bench.training._time_pass", record)
    small = ["model.depth=1", "model.width=8", "model.heads=1", "model.vocab_size=32"]
    names = {"tost": "quickstart", "gpt2": "gpt2-base"}
    autocast = ["deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast.dtype=bfloat16"]
    runs = {name: load_config(ROOT / "configs" / f"{file}.yaml", small + autocast) for name, file in names.items()}
    rates = bench_training(runs, [32, 512], tokens=128, repeats=2, device=torch.device("cpu"))
    assert rates == [Rate("tost", 32, 256), Rate("gpt2", 32, 256), Rate("tost", 512, 1024), Rate("gpt2", 512, 1024)]
    # They take turns, after a pass each that warms up; positions grow with the context.
    assert (
        passes
        == [("tssa_delta", None, 4, 32), ("softmax", 32, 4, 32)] * 3
        + [
            ("tssa_delta", None, 1, 512),
            ("softmax", 512, 1, 512),
        ]
        * 3
    )


def test_ratios_are_of_the_first_model() -> None:
    lines = table([Rate("a", 64, 3000), Rate("b", 64, 1500)]).splitlines()
    assert lines[0].split()[:3] == ["context", "a", "b"]
    assert lines[1].split() == ["64", "3,000", "1,500", "2.00x"]


def test_the_verb(run: Run, tmp_path: Path) -> None:
    configs = [str(run.file), str(ROOT / "configs" / "quickstart-gpt2.yaml")]
    options = [
        "--contexts",
        "32,64",
        "--tokens",
        "64",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "r.json"),
    ]
    printed = succeed(tostlm("bench", "train", *configs, *options))
    assert "run / quickstart-gpt2" in printed
    written = json.loads((tmp_path / "r.json").read_text())
    assert [rate["context"] for rate in written["rates"]] == [32, 32, 64, 64]
    assert all(rate["tokens_per_second"] > 0 for rate in written["rates"])
    assert "1 threads" in written["machine"]
