"""Real engines in real process groups, several one after another, for what training runs would take minutes to show."""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.accelerator.cpu_accelerator as cpu
import torch
import torch.distributed as dist

from tests.conftest import ROOT
from tostlm.checkpoint import Progress, checkpoint_folder
from tostlm.config import load_config
from tostlm.data import common_tokenizer
from tostlm.errors import UserError
from tostlm.launch import Ranks, ranks_from_environment
from tostlm.model import create_lm
from tostlm.train.carry import Carry
from tostlm.train.checkpoint import Saver
from tostlm.train.engine import join_ranks, start_engine, train_step
from tostlm.train.engine_state import gather_state, loss_scale, state_numels, whole_weights
from tostlm.train.feed import Rows, training_loader
from tostlm.train.resume import resume
from tostlm.train.schedule import learning_rate

KEPT_STEP, LAST_STEP = 3, 6  # of a job: the one it saves, and goes on from if it is to; and its end
CARRY = {"sums": torch.arange(6, dtype=torch.float64).view(2, 3), "reset": torch.tensor([True, False])}


class Job(NamedTuple):
    """A run: its config's file and overrides, and the run_dir whose checkpoint it goes on from."""

    config: str
    overrides: list[str]
    origin: str | None = None


def launch(world: int, jobs: list[Job], folder: Path) -> list[subprocess.Popen[str]]:
    """Start `world` ranks that do the jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.engines", str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        )
        for place in places(world)
    ]


def places(world: int) -> list[dict[str, str]]:
    """The environments that tell `world` ranks here who they are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_jobs(world: int, jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """What rank 0 says of each job, see `do`."""
    for process in launch(world, jobs, folder):
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
    return json.loads((folder / "results.json").read_text())


def do(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Train to LAST_STEP, saving KEPT_STEP; a job that goes on saves at once what it has read."""
    config = load_config(Path(job.config), job.overrides)
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)
    progress, facts, losses = Progress(), {}, {}
    loader, carry = training_loader(config), Carry(config, engine.gradient_accumulation_steps(), ranks)
    with Saver(config, common_tokenizer(config.data.folders), ranks, lambda: None) as saver:
        if job.origin:
            progress = resume(engine, checkpoint_folder(Path(job.origin), KEPT_STEP))
            facts = state_facts(engine)
            saver.save(engine, progress, {})
        for step in range(progress.step, LAST_STEP):
            rows = Rows.of(loader.batch(step, ranks.rank, ranks.world))
            lr = learning_rate(config, step)
            update = train_step(engine, rows, lr, lambda loss: False, False, carry, lambda name: nullcontext())
            losses[step + 1] = update.loss
            progress = progress.after(update.skipped)
            if step + 1 == KEPT_STEP:
                saver.save(engine, progress, CARRY if config.data.carry_state else {})
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


def main(folder: Path) -> None:
    # DeepSpeed refuses fp16 on processors that lack it, though torch computes in it everywhere.
    cpu.CPU_Accelerator.is_fp16_supported = lambda self: True
    ranks = ranks_from_environment(os.environ)
    assert ranks is not None
    join_ranks(ranks)
    results = [do(Job(*job), ranks) for job in json.loads((folder / "jobs.json").read_text())]
    if ranks.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        print(f"tostlm: error: {error}", file=sys.stderr)
        os._exit(2)
    os._exit(0)  # as tostlm's own ranks end
