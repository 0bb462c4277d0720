"""Real DeepSpeed on one and two processes: every stage the same losses, every resume the same curve."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import checkpoints, load, read_progress
from tostlm.model import create_lm

STAGES = (0, 1, 2, 3)
TOLERANCE = {"false": 1e-4, "true": 2e-2}  # of a loss, without and with bf16


def options(stage: int, bf16: str = "false") -> list[str]:
    return [f"deepspeed.zero_optimization.stage={stage}", f"deepspeed.bf16.enabled={bf16}"]


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process at stage 0 in fp32: what every other way of training is held against."""
    run = Run(tmp_path_factory.mktemp("single"), data)
    succeed(run.train(*options(0)))
    losses = run.metrics("train")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.3
    return losses


@pytest.mark.parametrize("bf16", ["false", "true"], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_alike_and_resumes_exactly(
    run: Run, single: dict[int, float], stage: int, bf16: str
) -> None:
    succeed(run.train(*options(stage, bf16), nproc=2))
    whole = run.metrics("train")
    for step, loss in whole.items():
        assert loss == pytest.approx(single[step], abs=TOLERANCE[bf16])
    norms = run.metrics("train", "grad_norm")
    heldout = run.metrics("heldout")

    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*options(stage, bf16), nproc=2))
    assert run.metrics("train") == whole
    assert run.metrics("train", "grad_norm") == norms
    assert run.metrics("heldout") == heldout

    portable = load(run.dir)
    assert read_progress(portable.path)._asdict() == {
        "step": 6,
        "tokens": 3072,
        "world_size": 2,
        "zero_stage": stage,
    }
    assert portable.lm.embed.weight.std() > 0


def test_softmax_trains_under_zero(data: Path, tmp_path: Path) -> None:
    losses = {}
    for stage, nproc in ((0, 1), (3, 2)):
        run = Run(tmp_path, data, "softmax")
        succeed(run.train(*options(stage), f"run_dir={tmp_path}/{stage}", nproc=nproc))
        run.dir = tmp_path / str(stage)
        losses[stage] = run.metrics("train")
    assert losses[3] == pytest.approx(losses[0], abs=1e-4)


def test_what_a_run_leaves_behind(trained: dict[str, Run]) -> None:
    run = trained["tssa"]
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000003", "step-00000006"]
    assert {path.name for path in run.dir.iterdir()} == {"checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx(run.metrics("train"))
    assert set(events.Tags()["scalars"]) >= {"train/lr", "train/grad_norm", "train/tokens_per_second", "heldout/loss"}
    for line in (run.dir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["tokens"] == json.loads(line)["step"] * 512


def test_the_weights_are_the_trained_ones(trained: dict[str, Run]) -> None:
    """The portable weights of the end give the held-out loss that training reported."""
    from tostlm.data import HELDOUT, Loader, TokenSet
    from tostlm.train.loop import on_device

    run = trained["tssa"]
    checkpoint = load(run.dir)
    assert not (checkpoint.lm.embed.weight == create_lm(checkpoint.config.model, 0).embed.weight).all()
    tokens = TokenSet(checkpoint.config.data.path, HELDOUT)
    loader = Loader(tokens, 64, sequences=2, seed=0)
    losses = []
    for index in range(4):
        inputs, targets = on_device(loader.batch(index, 0, 1), checkpoint.lm.embed.weight.device)
        losses.append(float(checkpoint.lm(inputs, targets=targets)[0]))
    assert sum(losses) / 4 == pytest.approx(run.metrics("heldout")[6], abs=1e-5)


def test_a_finished_run_is_left_alone(trained: dict[str, Run]) -> None:
    run = trained["tssa"]
    before = (run.dir / "metrics.jsonl").read_text()
    assert "finished" in succeed(run.train())
    assert (run.dir / "metrics.jsonl").read_text() == before


def test_retention(run: Run) -> None:
    succeed(run.train("train.save_every_steps=1", "train.keep_last_checkpoints=2"))
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000005", "step-00000006"]


def test_an_interrupted_run_goes_on(run: Run) -> None:
    arguments = [
        "train",
        str(run.file),
        "train.steps=2000",
        "train.save_every_steps=2",
        "train.keep_last_checkpoints=2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tostlm", *arguments, "--nproc", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not checkpoints(run.dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal's Ctrl-C does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines() == ["tostlm: interrupted; the same command goes on from what is finished"]

    reached = read_progress(checkpoints(run.dir)[-1]).step
    succeed(run.train(f"train.steps={reached + 2}", nproc=2))
    assert list(run.metrics("train")) == list(range(1, reached + 3))


def test_a_killed_rank_ends_the_run(run: Run) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tostlm", "train", str(run.file), "train.steps=100000", "--nproc", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not checkpoints(run.dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(timeout=30) == 128 + signal.SIGKILL
    assert not Path(f"/proc/{children[0]}").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.width=64"], ["model.width=32", "model.width=64", "choose another run_dir"]),
        (["seed=5"], ["seed=0", "seed=5"]),
        (["train.batch_tokens=1024"], ["train.batch_tokens=512"]),
        (options(2), ["written by 1 ranks at ZeRO stage 1", "at stage 2"]),
    ],
)
def test_a_checkpoint_of_another_run(trained: dict[str, Run], overrides: list[str], words: list[str]) -> None:
    fail(trained["tssa"].train("train.steps=8", *overrides), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vocab_size=300"], ["model.vocab_size 300 is smaller than the 512 pieces"]),
        (["data.path=nowhere"], ["nowhere holds no prepared data", "tostlm prepare"]),
        (["train.micro_batch_tokens=192"], ["does not divide into 2 ranks x train.micro_batch_tokens 192"]),
        (
            ["data.context_tokens=128000", "train.batch_tokens=256000", "train.micro_batch_tokens=128000"],
            ["one window"],
        ),
        (["run_dir=/proc/nowhere"], ["cannot write in /proc/nowhere"]),
        (["deepspeed.zero_optimization.stgae=2"], ["DeepSpeed refuses the deepspeed block", "stgae"]),
    ],
)
def test_runs_that_cannot_start(run: Run, overrides: list[str], words: list[str]) -> None:
    fail(run.train(*overrides, nproc=2), *words)
    assert not checkpoints(run.dir)


def test_a_damaged_shard_is_found_before_training(run: Run, tmp_path: Path, data: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    content = bytearray((copy / "train-00000.bin").read_bytes())
    content[100] ^= 1
    (copy / "train-00000.bin").write_bytes(content)
    fail(run.train(f"data.path={copy}"), "train-00000.bin is damaged")


def test_a_damaged_checkpoint(run: Run) -> None:
    succeed(run.train())
    newest = checkpoints(run.dir)[-1]
    for shard in (newest / "engine" / "shards").glob("*.pt"):
        os.truncate(shard, 100)
    line = fail(run.train("train.steps=8"), "cannot be read", f"remove {newest}")
    assert "to resume from the checkpoint before it" in line
    shutil.rmtree(newest)
    succeed(run.train("train.steps=8"))


def test_nproc_is_not_for_a_launcher(run: Run) -> None:
    result = tostlm("train", str(run.file), "--nproc", "2", RANK="0", WORLD_SIZE="2")
    fail(result, "--nproc 2 is for machines without a launcher")


def test_torchrun_is_a_launcher(run: Run) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tostlm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "train", str(run.file)], check=True, capture_output=True, timeout=120, env=environment)
    assert read_progress(checkpoints(run.dir)[-1]).world_size == 2
