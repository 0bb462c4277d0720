"""The bare loop that training is compared with trains the same model on the same batches."""

import json
from pathlib import Path

import pytest

from tests.conftest import Run, fail, succeed, tostlm


@pytest.mark.parametrize("nproc", [1, 2])
def test_both_loops_make_the_same_steps(run: Run, tmp_path: Path, nproc: int) -> None:
    options = ["--nproc", str(nproc), "--repeats", "4", "--out", str(tmp_path / "loop.json")]
    printed = succeed(tostlm("bench", "loop", str(run.file), *options))
    bare = "PyTorch" if nproc == 1 else "DistributedDataParallel"
    assert "tostlm train" in printed and bare in printed and "tostlm / bare" in printed
    found = json.loads((tmp_path / "loop.json").read_text())
    assert found["ranks"] == nproc and found["own"] > 0 and found["bare"] > 0
    own, other = found["losses"]
    assert own == pytest.approx(other, abs=1e-4)
    assert not run.dir.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.name=muon"], "no optimizer.name muon; set adamw"),
        (["deepspeed.bf16.enabled=true"], "no weights in bf16"),
        (["train.ema_decay=0.9"], "no train.ema_decay; leave it out"),
    ],
)
def test_runs_that_a_bare_loop_does_not_make(run: Run, overrides: list[str], words: str) -> None:
    fail(tostlm("bench", "loop", str(run.file), *overrides, "--nproc", "1"), words)
