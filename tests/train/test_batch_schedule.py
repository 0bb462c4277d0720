"""Batches that grow: every stage of ZeRO on any ranks makes the updates that one process makes on whole batches."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, succeed
from tests.train.engines import LAST_STEP, Job, run_jobs
from tostlm.checkpoint import checkpoints
from tostlm.config import RunConfig
from tostlm.model import create_lm, parameter_groups
from tostlm.train.batches import Batch, open_data
from tostlm.train.engine import compute_loss
from tostlm.train.trainer import learning_rate

SCHEDULE = [
    "data.curriculum=[{until_step: 2, batch_tokens: 128}, {until_step: 4, batch_tokens: 384, context_tokens: 32}]",
    "train.micro_batch_tokens=64",
]
BATCHES = {1: 128, 2: 128, 3: 384, 4: 384, 5: 512, 6: 512}
ENGINES = {
    **{f"stage {stage}": [f"deepspeed.zero_optimization.stage={stage}"] for stage in range(4)},
    "stage 2, offload": [
        "deepspeed.zero_optimization.stage=2",
        "deepspeed.zero_optimization.offload_optimizer.device=cpu",
    ],
}


def plain_losses(config: RunConfig) -> dict[int, float]:
    """Train by torch alone on batches that are never divided."""
    lm, training = create_lm(config.model, config.seed), open_data(config, 1).training
    settings, losses = config.optimizer, {}
    adamw = torch.optim.AdamW(parameter_groups(lm, settings.weight_decay), betas=settings.betas, eps=settings.eps)
    for step in range(LAST_STEP):
        batch = Batch.from_numpy(training.batch(step, 0, 1))
        assert batch.inputs.numel() == BATCHES[step + 1]
        loss, _ = compute_loss(lm, batch)
        lm.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), config.deepspeed["gradient_clipping"])
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
        losses[step + 1] = loss.item()
    return losses


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return plain_losses(Run(tmp_path_factory.mktemp("plain"), data).config(*SCHEDULE))


@pytest.mark.parametrize(
    "engines",
    [("stage 0", "stage 3", "stage 2, offload"), pytest.param(("stage 1", "stage 2"), marks=pytest.mark.slow)],
    ids=str,
)
def test_every_stage_makes_the_updates_of_whole_batches(
    data: Path, tmp_path: Path, plain: dict[int, float], engines: tuple[str, ...]
) -> None:
    run = Run(tmp_path, data)
    jobs = [Job(str(run.file), [*SCHEDULE, *ENGINES[name], f"run_dir={tmp_path / name}"], None) for name in engines]
    # The third step is in the middle of a stage; others go on from there on other ranks.
    others = [
        job._replace(overrides=[*job.overrides, "run_dir=" + str(tmp_path / "other")], origin=str(tmp_path / name))
        for name, job in zip(engines, jobs, strict=True)
    ]
    for found in run_jobs(2, jobs, tmp_path / "two"), run_jobs(1, others, tmp_path / "one"):
        for name, result in zip(engines, found, strict=True):
            losses = result["losses"]
            assert losses == pytest.approx({step: plain[step] for step in losses}, abs=1e-4), name
            assert max(losses) == LAST_STEP


def test_a_run_counts_the_tokens_of_its_stages(run: Run) -> None:
    succeed(run.train(*SCHEDULE, nproc=2))
    assert run.metrics("train", "tokens") == {1: 128, 2: 256, 3: 640, 4: 1024, 5: 1536, 6: 2048}
    shutil.rmtree(checkpoints(run.dir)[-1])
    losses = run.metrics("train")
    succeed(run.train(*SCHEDULE, nproc=2))
    assert run.metrics("train") == losses
