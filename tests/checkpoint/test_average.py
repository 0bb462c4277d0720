"""The mean of checkpoints is a checkpoint of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import checkpoints, load_checkpoint, read_train_state


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("averaged"), data)
    succeed(run.train("train.save_every_steps=2", "train.save_weights=false"))
    return run


def test_the_mean_of_the_last_checkpoints(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    said = succeed(tostlm("checkpoint", "average", str(run.dir), "--last", "3", "--out", str(out)))
    sources = checkpoints(run.dir)
    assert len(sources) == 3 and all(str(source) in said for source in sources)
    mean, wholes = load_checkpoint(out), [dict(load_checkpoint(source).lm.named_parameters()) for source in sources]
    for name, weight in mean.lm.named_parameters():
        expected = torch.stack([whole[name].double() for whole in wholes]).mean(0)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(weight, wholes[-1][name])
    assert read_train_state(out).step == 6
    assert json.loads((out / "averaged.json").read_text()) == [str(source) for source in sources]


def test_a_mean_is_evaluated_converted_and_averaged_further(run: Run, tmp_path: Path) -> None:
    first, *_, last = checkpoints(run.dir)
    mean, again = tmp_path / "mean", tmp_path / "again"
    succeed(tostlm("checkpoint", "average", str(first), str(last), "--out", str(mean)))
    succeed(tostlm("checkpoint", "average", str(mean), str(last), "--out", str(again)))
    weights = [load_checkpoint(path).lm.embed.weight for path in (first, last, again)]
    torch.testing.assert_close(weights[2], weights[0] / 4 + weights[1] * 3 / 4)
    succeed(tostlm("eval", "perplexity", str(mean), "--contexts", "32,64"))
    assert (mean / "perplexity.json").exists()
    succeed(tostlm("generate", str(mean), "--tokens", "3"))
    succeed(tostlm("convert", str(mean), "--to", "hf", str(tmp_path / "hf")))
    said = succeed(run.train("train.steps=8", f"run_dir={tmp_path}/other", "--from", str(mean)))
    assert f"begins from {mean}, at step 6" in said


def test_what_has_no_mean(run: Run, trained: dict[str, Run], tmp_path: Path) -> None:
    first, *_, last = map(str, checkpoints(run.dir))
    out = ("--out", str(tmp_path / "mean"))
    fail(tostlm("checkpoint", "average", first, *out), f"a mean takes two checkpoints or more, and {first} is one")
    (tmp_path / "same").symlink_to(first)
    fail(tostlm("checkpoint", "average", last, first, str(tmp_path / "same"), *out), f"{first} is named twice")
    among = ("--out", str(run.dir / "checkpoints" / "step-00000009"))
    fail(tostlm("checkpoint", "average", first, last, *among), "is among the checkpoints of a run")
    fail(tostlm("checkpoint", "average", str(run.dir), "--last", "4", *out), "has 3 checkpoints, not 4")
    fail(tostlm("checkpoint", "average", first, str(tmp_path), *out), "is neither a checkpoint nor the folder of a run")
    fail(tostlm("checkpoint", "average", str(trained["softmax"].dir), last, *out), "are of different models")
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    next((copy / "state").glob("*")).write_bytes(b"")
    fail(tostlm("checkpoint", "average", str(copy), last, *out), "is damaged: 00000.safetensors has 0 bytes")
    fail(tostlm("checkpoint", "average", first, last, "--out", str(copy)), f"{copy} exists")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    fail(tostlm("checkpoint", "average", first, last, "--out", str(tmp_path / "dangling")), "dangling exists")
    low = Run(tmp_path, run.config().data.folders[0])
    succeed(low.train("deepspeed.bf16.enabled=true", "train.steps=2"))
    fail(
        tostlm("checkpoint", "average", first, str(low.dir), *out),
        f"{first} is of precision fp32,",
        "of bf16; take one",
    )
    assert not (tmp_path / "mean").exists()
