"""What a GPU will be asked runs to its end, as far as a CPU can say."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.gpu_check import Sizes, check

SMALL = Sizes(
    ["tests/test_autograd.py"],
    ["--shapes", "32x2", "--tokens", "64", "--repeats", "1"],
    ["quickstart", "quickstart-gpt2", "--contexts", "32", "--tokens", "32", "--repeats", "1"],
    ["quickstart", "--contexts", "32", "--tokens", "2"],
    ["quickstart", "train.steps=20", "optimizer.warmup_steps=2", "model.depth=1", "model.width=32",
     "model.vocab_size=1000", "data.context_tokens=64", "train.batch_tokens=128", "train.micro_batch_tokens=128",
     "train.eval_contexts=[]"],
)  # fmt: skip


@pytest.mark.slow
def test_all_parts_run() -> None:
    found = check(SMALL)
    assert found["parity"]["exit_code"] == 0 and "passed" in found["parity"]["summary"]
    assert found["training"]["rates"][0]["model"] == "quickstart" and found["decoding"]["decode"]
    assert found["operator"]
    assert 0 < found["run"]["loss"] < found["run"]["first_loss"]
    assert found["run"]["planned_memory_bytes"] > 0 and found["run"]["memory_bytes"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("gpu-check: torch sees no GPU here")
