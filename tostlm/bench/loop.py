"""What `tostlm train` costs beside a bare loop of PyTorch's over the same model, batches and optimizer."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tostlm.bench.report import begin, clock, now, report, take_turns
from tostlm.config import RunConfig, matmul_dtype
from tostlm.errors import UserError
from tostlm.launch import RankInfo
from tostlm.model import create_lm, parameter_groups
from tostlm.train.batches import Batch, RankBatches, RecurrentState, micro_batches, open_data
from tostlm.train.engine import compute_loss, init_distributed, start_engine, train_step
from tostlm.train.metrics import PhaseTimers

RATE = 1e-4  # of both loops


class Loops(NamedTuple):
    """What steps of both loops took, and what they were for."""

    own: float  # tokens per second of a rank, the median of interleaved steps
    bare: float
    ratio: float  # of their speeds, the median over pairs of steps made one after the other
    losses: tuple[float, float]  # of the last step, of tostlm's loop and of the bare one


def report_loop(config: RunConfig, ranks: RankInfo, repeats: int, threads: int, out: Path | None) -> str | None:
    """Time both loops on a run's data and return a table; None on other ranks than rank 0. Every rank calls this.

    Raises:
        UserError: a bare loop makes no such run, its data do not fit it, or the file cannot be written.
    """
    _require_comparable(config)
    begin(threads, out)
    device = init_distributed(ranks)
    found = bench_loop(config, ranks, repeats, device)
    dist.destroy_process_group()
    if ranks.rank:
        return None
    bare = "PyTorch" if ranks.world_size == 1 else "DistributedDataParallel"
    rows = [
        f"{'tostlm train':<24}{found.own:>12,.0f} tokens/s a rank, loss {found.losses[0]:.5f}",
        f"{bare:<24}{found.bare:>12,.0f} tokens/s a rank, loss {found.losses[1]:.5f}",
        f"{'tostlm / bare':<24}{found.ratio:>12.3f}",
    ]
    about = {"config": config.run_dir.name, "precision": config.precision, "stage": config.zero_stage}
    return report("\n".join(rows), device, out, **about, ranks=ranks.world_size, **found._asdict())


def _require_comparable(config: RunConfig) -> None:
    """Refuse runs that a bare loop does not make: it has AdamW, fp32 weights, and one sequence on a rank."""
    wrong = {
        f"optimizer.name {config.optimizer.name}; set adamw": config.optimizer.name != "adamw",
        f"weights in {config.precision}; set fp32 or torch_autocast": config.precision in ("bf16", "fp16"),
        "train.context_parallel_size above 1; set 1": config.train.context_parallel_size > 1,
        "data.stateful; set false": config.data.stateful,
        "optimizer.groups; leave them out": bool(config.optimizer.groups),
        "train.ema_decay; leave it out": config.train.ema_decay is not None,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"bench loop: the bare loop has no {what}")


def bench_loop(config: RunConfig, ranks: RankInfo, repeats: int, device: torch.device) -> Loops:
    """Return what steps of both loops took, which take turns on the same batches. Every rank must call this.

    One rank on a CPU is timed by its own seconds, so that other programs hardly change them.
    """
    data = open_data(config, ranks.world_size)
    engine, timers = start_engine(config, data.plan, ranks), PhaseTimers(device)
    state = RecurrentState(config, data.plan.accumulation, ranks)
    bare = _bare_step(config, ranks, device)
    tick = clock if ranks.world_size == 1 else now
    parts: list[Batch] = []
    losses = {"own": 0.0, "bare": 0.0}

    def own_step() -> float:
        start = tick(device)
        with timers("data"):
            parts[:] = micro_batches(next(batches), config)
        losses["own"] = train_step(engine, parts, RATE, lambda loss: False, False, state, timers).loss
        return tick(device) - start

    def bare_step() -> float:
        start = tick(device)
        losses["bare"] = bare(parts)
        return tick(device) - start

    with closing(RankBatches(data, ranks, device).training(0)) as batches:
        timed = take_turns({"own": own_step, "bare": bare_step}, repeats)
    bare_loss = torch.tensor(losses["bare"] / ranks.world_size, device=device)
    dist.all_reduce(bare_loss)
    tokens = data.plan.accumulation * config.train.micro_batch_tokens
    own, other = (tokens / statistics.median(timed[name]) for name in ("own", "bare"))
    ratio = statistics.median(b / a for a, b in zip(timed["own"], timed["bare"], strict=True))
    return Loops(own, other, ratio, (losses["own"], float(bare_loss)))


def _bare_step(config: RunConfig, ranks: RankInfo, device: torch.device) -> Callable[[list[Batch]], float]:
    """Return a function that makes a training step as a script of a few lines does, and returns its loss."""
    lm = create_lm(config.model, config.seed).to(device)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(lm, settings.weight_decay), lr=RATE, betas=settings.betas, eps=settings.eps,
        fused=device.type == "cuda",
    )  # fmt: skip
    model: Any = DistributedDataParallel(lm) if ranks.world_size > 1 else lm
    dtype, clip = matmul_dtype(config), config.deepspeed.get("gradient_clipping", 0.0)

    def step(parts: list[Batch]) -> float:
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = compute_loss(model, part)[0] / len(parts)
            loss.backward()
            total = total + loss.detach()
        if clip:
            torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step
