"""Real engines in real process groups, several in turn, which is much faster than a training run for each."""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.accelerator.cpu_accelerator as cpu
import torch
import torch.distributed as dist

from tests.processes import on_ranks
from tostlm.checkpoint.deepspeed_state import gather_state, gather_weights, loss_scale, state_numels
from tostlm.checkpoint.layout import TrainState, checkpoint_folder, read_recurrent_state
from tostlm.checkpoint.load import resume
from tostlm.checkpoint.save import CheckpointSaver
from tostlm.config import RunConfig, load_config
from tostlm.launch import RankInfo
from tostlm.train.batches import RankBatches, RecurrentState, RunData, micro_batches, open_data
from tostlm.train.engine import StepResult, TrainingEngine, start_engine, train_step
from tostlm.train.trainer import learning_rate

KEPT_STEP, LAST_STEP = 3, 6  # of a job: the step that it saves and may be resumed from, and the last one


class Job(NamedTuple):
    """A run: its config's file and overrides, and the run_dir whose checkpoint it resumes from."""

    config: str
    overrides: list[str]
    origin: str | None = None


def run_jobs(world_size: int, jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """Run the jobs on `world_size` ranks and return rank 0's results, see `run_job`."""
    results: list[dict[str, Any]] = on_ranks(world_size, partial(_run_all, jobs), folder)[0]
    return results


def _run_all(jobs: list[Job], rank: int, world_size: int) -> list[dict[str, Any]]:
    # DeepSpeed refuses fp16 on processors that lack it, though torch computes in it everywhere.
    cpu.CPU_Accelerator.is_fp16_supported = lambda self: True
    results = [run_job(job, RankInfo(rank, rank, world_size)) for job in jobs]
    dist.barrier()
    return results


def run_job(job: Job, ranks: RankInfo) -> dict[str, Any]:
    """Train to LAST_STEP and save KEPT_STEP; a job that resumes first saves again what it has read."""
    config = load_config(Path(job.config), job.overrides)
    data = open_data(config, ranks.world_size)
    engine = start_engine(config, data.plan, ranks)
    state, facts, losses = TrainState(), {}, {}
    recurrent_state = RecurrentState(config, data.plan.accumulation, ranks)
    with CheckpointSaver(config, data.tokenizer, ranks, lambda progress: None) as saver:
        if job.origin:
            checkpoint = checkpoint_folder(Path(job.origin), KEPT_STEP)
            state = resume(engine, config, checkpoint)
            recurrent_state.restore(read_recurrent_state(checkpoint), engine.module, torch.device("cpu"))
            facts = state_facts(engine)
            saver.save(engine, state, recurrent_state.gather())
        for result in train_steps(config, data, engine, ranks, recurrent_state, state.step, LAST_STEP):
            state = state.advance(result.skipped)
            losses[state.step] = result.loss
            if state.step == KEPT_STEP:
                saver.save(engine, state, recurrent_state.gather())
    engine.destroy()
    return {"losses": losses, **facts}


def train_steps(
    config: RunConfig,
    data: RunData,
    engine: TrainingEngine,
    ranks: RankInfo,
    recurrent_state: RecurrentState,
    first: int,
    last: int,
) -> Iterator[StepResult]:
    """Train from step `first` to step `last`, and yield the result of each step."""
    with closing(RankBatches(data, ranks, torch.device("cpu")).training(first)) as batches:
        for step in range(first, last):
            parts = micro_batches(next(batches), config)
            lr = learning_rate(config, step)
            yield train_step(engine, parts, lr, lambda loss: False, False, recurrent_state, lambda name: nullcontext())


def state_facts(engine: TrainingEngine) -> dict[str, Any]:
    """Return what must hold of an engine right after it was restored."""
    weights = gather_weights(engine)
    masters = gather_state(engine, dict.fromkeys(state_numels(engine), 0))
    counts = [state["step"] for state in engine.basic_optimizer.state.values() if "step" in state]
    tensors = [count for count in counts if isinstance(count, torch.Tensor)]
    return {
        "weights_unlike_masters": [n for n, w in weights.items() if not masters[f"{n}/weight"].to(w.dtype).equal(w)],
        "adam_steps": sorted({int(count) for count in counts}),
        "shared_counts": len(tensors) - len({count.data_ptr() for count in tensors}),
        "weight_decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "loss_scale": loss_scale(engine),
    }
