"""Real engines in real process groups, several one after another, for what training runs would take minutes to show."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.accelerator.cpu_accelerator as cpu
import torch
import torch.distributed as dist
from tostlm.train.carry import RecurrentState
from tostlm.train.schedule import learning_rate

from tests.processes import on_ranks
from tostlm.checkpoint.deepspeed_state import gather_state, loss_scale, state_numels, whole_weights
from tostlm.checkpoint.layout import TrainState, checkpoint_folder
from tostlm.checkpoint.load import resume
from tostlm.checkpoint.save import CheckpointSaver
from tostlm.config import load_config
from tostlm.data import common_tokenizer
from tostlm.launch import RankInfo
from tostlm.model import create_lm
from tostlm.train.batches import Batch, training_loader
from tostlm.train.engine import start_engine, train_step

KEPT_STEP, LAST_STEP = 3, 6  # of a job: the one it saves, and goes on from if it is to; and its end
CARRY = {"sums": torch.arange(6, dtype=torch.float64).view(2, 3), "reset": torch.tensor([True, False])}


class Job(NamedTuple):
    """A run: its config's file and overrides, and the run_dir whose checkpoint it goes on from."""

    config: str
    overrides: list[str]
    origin: str | None = None


def run_jobs(world_size: int, jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """Do the jobs on `world_size` ranks; what rank 0 says of each, see `do`."""
    return on_ranks(world_size, partial(_do_all, jobs), folder)[0]


def _do_all(jobs: list[Job], rank: int, world_size: int) -> list[dict[str, Any]]:
    # DeepSpeed refuses fp16 on processors that lack it, though torch computes in it everywhere.
    cpu.CPU_Accelerator.is_fp16_supported = lambda self: True
    results = [do(job, RankInfo(rank, rank, world_size)) for job in jobs]
    dist.barrier()
    return results


def do(job: Job, ranks: RankInfo) -> dict[str, Any]:
    """Train to LAST_STEP, saving KEPT_STEP; a job that goes on saves at once what it has read."""
    config = load_config(Path(job.config), job.overrides)
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)
    progress, facts, losses = TrainState(), {}, {}
    loader, carry = training_loader(config), RecurrentState(config, engine.gradient_accumulation_steps(), ranks)
    with CheckpointSaver(config, common_tokenizer(config.data.folders), ranks, lambda: None) as saver:
        if job.origin:
            progress = resume(engine, checkpoint_folder(Path(job.origin), KEPT_STEP))
            facts = state_facts(engine)
            saver.save(engine, progress, {})
        for step in range(progress.step, LAST_STEP):
            rows = Batch.of(loader.batch(step, ranks.rank, ranks.world_size))
            lr = learning_rate(config, step)
            update = train_step(engine, rows, lr, lambda loss: False, False, carry, lambda name: nullcontext())
            losses[step + 1] = update.loss
            progress = progress.after(update.skipped)
            if step + 1 == KEPT_STEP:
                saver.save(engine, progress, CARRY if config.data.stateful else {})
    engine.destroy()
    return {"losses": losses, **facts}


def state_facts(engine: Any) -> dict[str, Any]:
    """What must hold of an engine right after it was restored."""
    weights = whole_weights(engine)
    masters = gather_state(engine, dict.fromkeys(state_numels(engine), 0))
    counts = [state["step"] for state in engine.basic_optimizer.state.values()]
    tensors = [count for count in counts if isinstance(count, torch.Tensor)]
    return {
        "weights_unlike_masters": [n for n, w in weights.items() if not masters[f"{n}/weight"].to(w.dtype).equal(w)],
        "adam_steps": sorted({int(count) for count in counts}),
        "shared_counts": len(tensors) - len({count.data_ptr() for count in tensors}),
        "weight_decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "loss_scale": loss_scale(engine),
    }
