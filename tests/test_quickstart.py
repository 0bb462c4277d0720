"""The quickstart on the real corpus with smaller models; a second run repeats nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, succeed, tostlm

STEPS = [
    "tokenizer",
    "token shards",
    "train ToST",
    "train GPT-2",
    "perplexity by context",
    "tokens per second",
    "Hugging Face export",
    "sample",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's configs, made small and short."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "configs").mkdir()
    for name in ("quickstart.yaml", "quickstart-gpt2.yaml"):
        content = yaml.safe_load((ROOT / "configs" / name).read_text())
        content["model"] |= {"depth": 1, "width": 32, "heads": 2, "vocab_size": 1024}
        content["train"] |= {"steps": 4, "save_every_steps": 2, "eval_tokens": 4096}
        content["optimizer"] |= {"warmup_steps": 1}
        (folder / "configs" / name).write_text(yaml.safe_dump(content))
    return folder


def test_all_steps_run_and_write_their_outputs(home: Path) -> None:
    printed = succeed(tostlm("quickstart", "--configs", "configs", cwd=home))
    assert [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")] == STEPS
    root = home / "runs" / "quickstart"
    report = json.loads((root / "perplexity.json").read_text())
    tost, gpt2 = ([score["context"] for score in model["scores"]] for model in report["models"])
    assert tost == [128, 256, 512, 1024, 2048, 4096, 8192]
    assert gpt2 == [128, 256, 512]
    assert "gpt2 has 512 learned positions and reads no further" in printed
    assert (root / "perplexity.png").stat().st_size > 10_000
    rates = json.loads((root / "throughput.json").read_text())["rates"]
    assert len(rates) == 6
    assert (root / "hf" / "modeling_tost.py").exists()
    assert (root / "sample.txt").read_text().startswith("Fellow citizens of the Senate")
    for name in ("tost", "gpt2"):
        assert (root / name / "metrics.jsonl").exists()
        assert list((root / name / "tensorboard").iterdir())
        assert f"runs/quickstart/{name}/checkpoints/step-00000004" in printed


def test_a_second_run_repeats_only_what_is_missing(home: Path) -> None:
    root = home / "runs" / "quickstart"
    shutil.rmtree(root / "gpt2" / "checkpoints" / "step-00000004")
    (root / "sample.txt").unlink()
    printed = succeed(tostlm("quickstart", "--configs", "configs", cwd=home))
    repeated = [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")]
    again = {"train GPT-2", "sample"}
    assert repeated == [step if step in again else f"{step}: finished before" for step in STEPS]
    assert "step 4/4" in printed
    assert "step 1/4" not in printed


@pytest.mark.slow
def test_the_results_of_the_readme(tmp_path: Path) -> None:
    """With the shipped configs ToST learns, beats GPT-2 and holds its perplexity at 16 times its context."""
    subprocess.run([sys.executable, "-m", "tostlm", "quickstart"], cwd=tmp_path, check=True, timeout=600)
    models = json.loads((tmp_path / "runs" / "quickstart" / "perplexity.json").read_text())["models"]
    tost, gpt2 = ({score["context"]: score["perplexity"] for score in model["scores"]} for model in models)
    assert tost[8192] < 1.02 * tost[512] < 0.7 * gpt2[512]
