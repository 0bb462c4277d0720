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
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run, fail, succeed, tostlm
from tests.train.run_helpers import REPORTED, VARIANTS, wait_for_a_checkpoint, zero_options
from tostlm.checkpoint import checkpoints, load_checkpoint, read_train_state
from tostlm.checkpoint.load import check_resumable
from tostlm.data import PreparationSettings, Tokenizer, prepare
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE, UserError
from tostlm.model import create_lm
from tostlm.train.batches import Batch, open_data
from tostlm.train.engine import compute_loss
from tostlm.train.trainer import check_run, learning_rate

TOLERANCE = {"false": 1e-4, "true": 2e-2}  # of a loss, without and with bf16


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process at stage 0 in fp32: what every other way of training is held against."""
    run = Run(tmp_path_factory.mktemp("single"), data)
    succeed(run.train(*zero_options(0)))
    losses = run.metrics("train")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.3
    return run


def assert_alike(run: Run, single: Run, tolerance: float) -> None:
    assert run.metrics("train") == pytest.approx(single.metrics("train"), abs=tolerance)
    if tolerance == TOLERANCE["false"]:
        norms = single.metrics("train", "grad_norm")
        assert run.metrics("train", "grad_norm") == pytest.approx(norms, rel=10 * tolerance)
    ours, theirs = (dict(load_checkpoint(r.dir).lm.named_parameters()) for r in (run, single))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        difference = (parameter.float() - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-3)
        assert difference < 20 * tolerance, name


RUNS = [(0, "false"), (3, "true")]  # tests of the engine and of split sequences show the others
OTHERS = [(stage, bf16) for stage in range(4) for bf16 in ("false", "true") if (stage, bf16) not in RUNS]


@pytest.mark.parametrize(("stage", "bf16"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in OTHERS)])
def test_every_stage_trains_alike_and_resumes_exactly(run: Run, single: Run, stage: int, bf16: str) -> None:
    succeed(run.train(*zero_options(stage, bf16), nproc=2))
    assert_alike(run, single, TOLERANCE[bf16])
    before = {key: run.metrics(kind, key) for kind, key in REPORTED}

    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*zero_options(stage, bf16), nproc=2))
    assert {key: run.metrics(kind, key) for kind, key in REPORTED} == before
    state = read_train_state(checkpoints(run.dir)[-1])
    assert (state.step, state.world_size) == (6, 2)


def test_autocast_trains_alike(run: Run, single: Run) -> None:
    """The authors' precision: fp32 weights, bf16 matrices."""
    autocast = ["deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast.dtype=bfloat16"]
    succeed(run.train(*zero_options(1), *autocast, nproc=2))
    assert_alike(run, single, TOLERANCE["true"])
    assert load_checkpoint(run.dir).lm.embed.weight.dtype == torch.float32
    assert run.metrics("train") != single.metrics("train")


@pytest.mark.slow
def test_softmax_trains_under_zero(data: Path, tmp_path: Path) -> None:
    losses = {}
    for stage, nproc in ((0, 1), (3, 2)):
        run = Run(tmp_path, data, "softmax")
        succeed(run.train(*zero_options(stage), f"run_dir={tmp_path}/{stage}", nproc=nproc))
        run.dir = tmp_path / str(stage)
        losses[stage] = run.metrics("train")
    assert losses[3] == pytest.approx(losses[0], abs=1e-4)


def test_what_a_run_leaves_behind(trained: dict[str, Run]) -> None:
    run = trained["tssa"]
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000003", "step-00000006"]
    assert {path.name for path in run.dir.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
    }
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx(run.metrics("train"))
    assert set(events.Tags()["scalars"]) >= {
        "train/lr",
        "train/grad_norm",
        "train/tokens_per_second",
        "validation/loss",
        "validation/bits_per_byte",
    }
    for line in (run.dir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["tokens"] == json.loads(line)["step"] * 512


def test_the_weights_are_the_trained_ones(trained: dict[str, Run]) -> None:
    """The portable weights of the end give the held-out loss that training reported."""
    run = trained["tssa"]
    checkpoint = load_checkpoint(run.dir)
    assert not (checkpoint.lm.embed.weight == create_lm(checkpoint.config.model, 0).embed.weight).all()
    data = open_data(checkpoint.config, 1)
    batches = [Batch.from_numpy(data.validation.batch(index, 0, 1)) for index in range(8)]
    losses = [float(compute_loss(checkpoint.lm, batch)[0]) for batch in batches]
    assert sum(losses) / len(losses) == pytest.approx(run.metrics("validation")[6], abs=1e-5)


def test_a_finished_run_is_left_alone(trained: dict[str, Run]) -> None:
    run = trained["tssa"]
    before = (run.dir / "metrics.jsonl").read_text()
    assert "finished" in succeed(run.train())
    assert (run.dir / "metrics.jsonl").read_text() == before


def test_an_interrupted_run_goes_on(run: Run) -> None:
    endless = ["train.steps=100000", "train.save_every_steps=2", "train.keep_last_checkpoints=2"]
    program = run.start(*endless, nproc=2)
    wait_for_a_checkpoint(run)
    os.killpg(program.pid, signal.SIGINT)  # what a terminal's Ctrl-C does
    ended = program.end(60)
    assert ended.returncode == 130
    assert ended.stderr.strip().splitlines() == [
        "tostlm: interrupted; the same command continues from what is finished"
    ]

    reached = read_train_state(checkpoints(run.dir)[-1]).step
    succeed(run.train(f"train.steps={reached + 2}", nproc=2))
    assert list(run.metrics("train")) == list(range(1, reached + 3))


@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_no_rank_stays_behind(run: Run, victim: str) -> None:
    program = run.start("train.steps=100000", nproc=2)
    wait_for_a_checkpoint(run)
    ranks = program.children()
    os.kill(ranks[1] if victim == "a rank" else program.pid, signal.SIGKILL if victim == "a rank" else signal.SIGTERM)
    assert program.end(30).returncode == (EXIT_LOST_RANK if victim == "a rank" else EXIT_REQUEUE)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.width=64"], ["model.width=32", "model.width=64", "choose another run_dir"]),
        (["seed=5"], ["seed=1", "seed=5"]),
        (["train.batch_tokens=1024"], ["train.batch_tokens=512"]),
        (["data.reset_at_documents=true"], ["has data.reset_at_documents=False, this run"]),
        (["data.within_documents=true"], ["has data.within_documents=False, this run"]),
        (
            ["data.curriculum=[{until_step: 2, context_tokens: 32}]"],
            ["has data.curriculum.0.until_step=unset, this run data.curriculum.0.until_step=2"],
        ),
        (["deepspeed.bf16.enabled=true"], ["has precision=fp32, this run precision=bf16"]),
    ],
)
def test_a_checkpoint_of_another_run(trained: dict[str, Run], overrides: list[str], words: list[str]) -> None:
    run = trained["tssa"]
    newest = checkpoints(run.dir)[-1]
    with pytest.raises(UserError) as error:
        check_resumable(run.config("train.steps=8", *overrides), Tokenizer.from_folder(newest), newest)
    for word in words:
        assert word in str(error.value)


def test_it_is_said_once_by_the_command(trained: dict[str, Run]) -> None:
    fail(trained["tssa"].train("train.steps=8", "seed=5", nproc=2), "has seed=1, this run seed=5")


def test_a_checkpoint_of_other_data(
    trained: dict[str, Run], corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run = trained["tssa"]
    other = tmp_path / "other"
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.3), tokenizer, other)
    fail(run.train("train.steps=8", f"data.path={other}"), f"was trained on other data than {other} holds")


def test_optimizer_settings_may_change_on_resume(run: Run) -> None:
    succeed(run.train())
    losses = run.metrics("train")
    for setting in ("optimizer.weight_decay=30.0", "optimizer.betas=[0.1,0.1]"):
        shutil.rmtree(checkpoints(run.dir)[-1])
        succeed(run.train(setting))
        assert run.metrics("train")[4] == losses[4]
        assert run.metrics("train")[6] != losses[6], setting


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
    ],
)
def test_what_is_checked_before_a_start(run: Run, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config = run.config(*overrides)
        check_run(config, open_data(config, 2))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run_dir=/proc/nowhere"], ["cannot write in /proc/nowhere"]),
        (
            ["deepspeed.csv_monitor={enabled: true, output_path: /proc/nowhere}"],
            ["cannot write in /proc/nowhere"],
        ),
    ],
)
def test_runs_that_cannot_start(run: Run, overrides: list[str], words: list[str]) -> None:
    fail(run.train(*overrides, nproc=2), *words)
    assert not checkpoints(run.dir)


def test_a_run_folder_is_one_process_groups(run: Run) -> None:
    first = run.start("train.steps=100000")
    wait_for_a_checkpoint(run)
    fail(run.train("train.steps=100000"), f"{run.dir} is in use by another tostlm train")
    first.send_signal(signal.SIGKILL)  # its ranks end with it, and their lock
    first.end()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        steps = run.metrics("train")
        time.sleep(1)
        if run.metrics("train") == steps:
            break
    succeed(run.train(f"train.steps={max(steps)}"))


def test_a_model_that_computes_no_numbers_is_not_saved(run: Run) -> None:
    fail(run.train("model.layer_scale=1e30", "train.steps=50", "train.save_every_steps=1"), "diverged", "no checkpoint")
    assert not checkpoints(run.dir)


def test_a_damaged_shard_is_found_before_training(run: Run, tmp_path: Path, data: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    content = bytearray((copy / "train-00000.bin").read_bytes())
    content[100] ^= 1
    (copy / "train-00000.bin").write_bytes(content)
    fail(run.train(f"data.path={copy}"), "train-00000.bin is damaged")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5 is not below"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
    ],
)
def test_half_an_environment(run: Run, environment: dict[str, str], words: str) -> None:
    fail(tostlm("train", str(run.file), **environment), words)


def test_nproc_is_not_for_a_launcher(run: Run) -> None:
    result = tostlm("train", str(run.file), "--nproc", "2", RANK="0", WORLD_SIZE="2")
    fail(result, "--nproc 2 is for machines without a launcher")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_resumes_exactly_after_many_steps(run: Run, stage: int) -> None:
    """After few steps the powers of beta are the same however they are taken."""
    options = [*zero_options(stage), *VARIANTS["offload"], "train.steps=60", "train.save_every_steps=16"]
    succeed(run.train(*options, nproc=2))
    before = {key: run.metrics(*key) for key in REPORTED}
    for checkpoint in checkpoints(run.dir)[1:]:
        shutil.rmtree(checkpoint)
    succeed(run.train(*options, nproc=2))
    assert {key: run.metrics(*key) for key in REPORTED} == before


def test_torchrun_is_a_launcher(run: Run) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tostlm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "train", str(run.file)], check=True, capture_output=True, timeout=120, env=environment)
    assert read_train_state(checkpoints(run.dir)[-1]).world_size == 2


def test_the_cosine_schedule(run: Run) -> None:
    config = run.config("train.steps=100", "optimizer.warmup_steps=10", "optimizer.lr=1.0", "optimizer.min_lr=0.1")
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_warmup_stable_decay_schedule(run: Run) -> None:
    config = run.config(
        "train.steps=100",
        "optimizer.warmup_steps=10",
        "optimizer.lr=1.0",
        "optimizer.min_lr=0.0",
        "optimizer.schedule=wsd",
        "optimizer.decay_steps=20",
    )
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0
