"""The moving average of the weights: its equation at every ZeRO stage, in evaluations, and in checkpoints."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tests.processes import on_ranks
from tests.train.run_helpers import zero_options
from tostlm.checkpoint import checkpoints, load_checkpoint
from tostlm.checkpoint.average import extract_ema
from tostlm.checkpoint.deepspeed_state import averaged_weights, gather_state, gather_weights, state_numels
from tostlm.checkpoint.layout import read_state
from tostlm.config import load_config
from tostlm.launch import RankInfo
from tostlm.optim import WeightAverage
from tostlm.plan import checkpoint_bytes
from tostlm.train.batches import Batch, RecurrentState, open_data
from tostlm.train.engine import start_engine, train_step

DECAY, STEPS = 0.6, 15
VARIANTS = {
    **{f"stage {stage}": zero_options(stage) for stage in range(4)},
    **{f"bf16 {stage}": zero_options(stage, "true") for stage in (0, 2)},
    "offload": [*zero_options(1), "deepspeed.zero_optimization.offload_optimizer.device=cpu"],
    "muon": [*zero_options(3), "optimizer.name=muon"],
}
FAST = ["stage 0", "bf16 2", "muon"]
OTHERS = pytest.param([name for name in VARIANTS if name not in FAST], marks=pytest.mark.slow, id="others")


def test_the_start_is_soon_forgotten() -> None:
    w = torch.tensor([8.0])
    average = WeightAverage(0.99, [w])
    expected = 8.0
    for t in range(1, 2000):
        w.fill_(float(t % 7))
        average.update([w])
        d = min(0.99, t / (t + 9))
        expected = d * expected + (1 - d) * (t % 7)
        assert float(average.of(w)) == pytest.approx(expected, rel=1e-4)
    average.exchange()
    assert float(w) == pytest.approx(expected, rel=1e-4) and float(average.of(w)) == 1999 % 7
    average.exchange()
    average.restart()
    assert float(average.of(w)) == 1999 % 7


def averages(run: Run, variants: list[str], rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Of each variant the fp32 weights before and after every step, the average, and what the model computes with."""
    ranks, found = RankInfo(rank, rank, world_size), {}
    for name in variants:
        config = run.config(*VARIANTS[name], f"train.ema_decay={DECAY}")
        data = open_data(config, world_size)
        engine = start_engine(config, data.plan, ranks)
        state, masters = RecurrentState(config, data.plan.accumulation, ranks), []
        everything = dict.fromkeys(state_numels(engine), 0)
        for step in range(STEPS):
            masters.append(gather_state(engine, everything))
            batch = Batch.from_numpy(data.training.batch(step, rank, world_size)).split(data.plan.accumulation)
            skip = step == 3  # and so no update, of weights or average
            train_step(engine, batch, 1e-2, lambda _, s=skip: s, False, state, lambda _: nullcontext())
        masters.append(gather_state(engine, everything))
        before = gather_weights(engine)
        with averaged_weights(engine):
            inside = gather_weights(engine)
        after, again = gather_weights(engine), gather_state(engine, everything)
        found[name] = {"masters": masters, "before": before, "inside": inside, "after": after, "again": again}
        engine.destroy()
    return found


@pytest.mark.parametrize("variants", [pytest.param(FAST, id="some"), OTHERS])
def test_the_average_at_every_stage(run: Run, tmp_path: Path, variants: list[str]) -> None:
    for name, found in on_ranks(2, partial(averages, run, variants), tmp_path)[0].items():
        masters, last = found["masters"], found["masters"][-1]
        for key in [key for key in last if key.endswith("/ema")]:
            parameter = key.removesuffix("/ema")
            weights = [each[f"{parameter}/weight"].double() for each in masters]
            average, t = weights[0], 0
            for step in range(STEPS):
                if step != 3:
                    t += 1
                    d = min(DECAY, t / (t + 9))
                    average = d * average + (1 - d) * weights[step + 1]
            torch.testing.assert_close(last[key].double(), average, rtol=1e-5, atol=1e-7, msg=f"{name} {key}")
            inside = found["inside"][parameter]
            assert torch.equal(inside, last[key].to(inside.dtype)), (name, key)
        assert all(torch.equal(found["after"][key], found["before"][key]) for key in found["before"]), name
        assert all(torch.equal(found["again"][key], last[key]) for key in last), name


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("ema"), data)
    succeed(run.train("train.ema_decay=0.5", "train.eval_contexts=[32]", "train.eval_tokens=2048", nproc=2))
    return run


def state(run: Run) -> dict[str, torch.Tensor]:
    lm, newest = load_checkpoint(run.dir).lm, checkpoints(run.dir)[-1]
    keys = {f"{name}/{kind}": range(p.numel()) for name, p in lm.named_parameters() for kind in ("weight", "ema")}
    return dict(read_state(newest, keys))


def test_an_evaluation_has_both_and_the_average_becomes_a_checkpoint(averaged: Run, tmp_path: Path) -> None:
    out = tmp_path / "ema"
    assert str(checkpoints(averaged.dir)[-1]) in succeed(
        tostlm("checkpoint", "ema", str(averaged.dir), "--out", str(out))
    )
    weights = dict(load_checkpoint(out).lm.named_parameters())
    for name, stored in state(averaged).items():
        if name.endswith("/ema"):
            assert torch.equal(weights[name.removesuffix("/ema")].flatten(), stored)
    assert averaged.metrics("validation", "ema/loss")[6] != averaged.metrics("validation", "loss")[6]
    arguments = ("--contexts", "32", "--windows", str(2048 // 32))
    succeed(tostlm("eval", "perplexity", str(out), *arguments))
    ((score,),) = [model["scores"] for model in json.loads((out / "perplexity.json").read_text())["models"]]
    assert averaged.metrics("validation", "ema/loss_at_32")[6] == pytest.approx(score["nats"], abs=1e-5)
    fail(tostlm("checkpoint", "ema", str(averaged.dir), "--out", str(out)), f"{out} exists")
    fail(tostlm("checkpoint", "ema", str(out), "--out", str(tmp_path / "x")), "has no moving average of the weights")


def test_a_resumed_run_has_the_same_average(averaged: Run, run: Run) -> None:
    """As one that begins from a checkpoint of another is resumed."""
    succeed(run.train("train.ema_decay=0.5", "--from", str(checkpoints(averaged.dir)[0]), nproc=2))
    found, expected = state(run), state(averaged)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_it_may_begin_and_end_when_a_run_resumes(averaged: Run, run: Run) -> None:
    """From weights without an average it begins as they are, and goes on after any resume as it would have."""
    origin = str(checkpoints(averaged.dir)[0])
    succeed(run.train("train.steps=4", "--from", origin))
    extract = run.dir.parent / "none"
    fail(tostlm("checkpoint", "ema", str(run.dir), "--out", str(extract)), "has no moving average of the weights")
    succeed(run.train("train.steps=5", "train.ema_decay=0.5"))
    found = state(run)
    one = checkpoints(run.dir)[-2]
    before = dict(read_state(one, {"embed.weight/weight": range(found["embed.weight/weight"].numel())}))
    expected = before["embed.weight/weight"] * 0.1 + found["embed.weight/weight"] * 0.9
    torch.testing.assert_close(found["embed.weight/ema"], expected)
    succeed(run.train("train.steps=6", "train.ema_decay=0.5"))
    again = state(run)
    expected = found["embed.weight/ema"] * 2 / 11 + again["embed.weight/weight"] * 9 / 11  # its second update
    torch.testing.assert_close(again["embed.weight/ema"], expected)


def test_a_checkpoint_is_as_large_as_the_doctor_says(averaged: Run) -> None:
    folder = checkpoints(averaged.dir)[-1]
    config = load_config(folder / "config.yaml")
    taken = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert 1 <= taken / checkpoint_bytes(config) < 1.1
    extract_ema(folder, averaged.dir.parent / "small")
    assert not list((averaged.dir.parent / "small").rglob("state"))
