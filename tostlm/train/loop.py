"""The training loop."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tostlm.checkpoint.layout import TrainState, read_carry, read_train_state
from tostlm.checkpoint.load import resume
from tostlm.checkpoint.save import CheckpointSaver
from tostlm.config import RunConfig
from tostlm.data import common_tokenizer
from tostlm.errors import EXIT_REQUEUE
from tostlm.launch import RankInfo
from tostlm.model import create_lm
from tostlm.train.batches import Batch, prefetch, training_loader, validation_loader
from tostlm.train.carry import RecurrentState
from tostlm.train.engine import (
    Phase,
    all_reduce_mean,
    context_group,
    init_distributed,
    learning_rates,
    start_engine,
    train_step,
)
from tostlm.train.health import SpikeDetector
from tostlm.train.metrics import Metrics
from tostlm.train.profiler import StepProfiler
from tostlm.train.rollback import roll_back
from tostlm.train.schedule import learning_rate
from tostlm.train.start import broadcast_from_rank0, check_run
from tostlm.train.statistics import layer_statistics
from tostlm.train.stop import StopRequest
from tostlm.train.watchdog import Watchdog


def train(config: RunConfig, ranks: RankInfo) -> None:
    """Train from the newest good checkpoint of the run's folder, or from the start, to the last step.

    Every rank calls it.

    Raises:
        UserError: the data, the folder or the checkpoint does not fit the config, or the run went bad too often.
        SystemExit: with `EXIT_REQUEUE`, all being saved, where a rank was asked to stop before the last step.
    """
    device = init_distributed(ranks)
    newest = broadcast_from_rank0(lambda: check_run(config, ranks.world_size), ranks)
    done = read_train_state(newest).step if newest is not None else 0
    if done >= config.train.steps:
        if ranks.rank == 0:
            print(f"{config.run_dir}: finished at step {done}; raise train.steps to go on")
        return
    with StopRequest(config.train.time_limit_minutes) as stop, Watchdog(config, ranks) as watchdog:
        step = go_on(config, ranks, device, newest, stop, watchdog)
        dist.barrier()  # Slurm ends all ranks as soon as one ends otherwise than well
    dist.destroy_process_group()
    if step < config.train.steps:
        if ranks.rank == 0:
            of_all = f"step {step} of {config.train.steps}"
            print(f"{config.run_dir}: stopped after {of_all} ({stop.reason}); the same command goes on")
        raise SystemExit(EXIT_REQUEUE)


def go_on(
    config: RunConfig, ranks: RankInfo, device: torch.device, newest: Path | None, stop: StopRequest, watchdog: Watchdog
) -> int:
    """Train from a checkpoint, or from the start, to the last step or a request to stop; returns the steps done."""
    settings, steps = config.train, config.train.steps
    tokenizer = common_tokenizer(config.data.folders)
    loader, heldout = training_loader(config), validation_loader(config, ranks.world_size)
    engine, carry, progress = begin(config, ranks, device, newest)
    group = context_group(settings.context_parallel_size)
    health = SpikeDetector(settings, progress.good_losses)
    heldout_passes = range(heldout.steps_within(settings.eval_tokens))
    stopping = False

    def due(every: int | None) -> bool:
        return every is not None and (progress.step % every == 0 or progress.step == steps)

    with (
        Metrics(config, progress.step, ranks) as metrics,
        StepProfiler(config, ranks) as trace,
        CheckpointSaver(config, tokenizer, ranks, watchdog.waiting) as saver,
        closing(prefetch(loader, range(progress.data_step, sys.maxsize), ranks, device, group)) as rows_ahead,
    ):

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            watchdog.beat(progress.step, name)
            with metrics.clock.phase(name):
                yield

        while progress.step < steps and not stopping:
            with phase("data"):
                rows = next(rows_ahead)
            with trace.step(progress.step + 1):
                lr = learning_rate(config, progress.step)
                update = train_step(engine, rows, lr, health.is_bad, stop.made, carry, phase)
            progress, stopping = progress.after(update.skipped), update.stop

            if update.skipped:
                metrics.event(progress.step, "skipped", loss=update.loss, grad_norm=update.grad_norm)
            if health.count(update.loss, update.bad):
                saver.finish()
                progress = roll_back(engine, config, progress, ranks, health.rollback_failed)
                health.rolled_back()
                metrics.rewind(progress.step)
                metrics.event(progress.step, "went back", rollbacks=progress.rollbacks)
                continue
            if due(settings.log_every_steps):
                rates, epochs = learning_rates(engine), loader.epochs(progress.data_step)
                metrics.train(
                    progress.step, update.loss, rates, update.grad_norm, rows.context, epochs, progress.skipped_steps
                )
            if due(settings.statistics_every_steps):
                with phase("statistics"):
                    metrics.statistics(progress.step, layer_statistics(engine, rows))
            if due(settings.eval_every_steps):
                loss = evaluate(engine, prefetch(heldout, heldout_passes, ranks, device, group), phase)
                progress = progress._replace(validation_loss=loss)
                metrics.heldout(progress.step, loss)
            if (due(settings.save_every_steps) or stopping) and (not update.bad or progress.step == steps):
                with phase("save"):
                    saver.save(engine, progress._replace(good_losses=health.good), carry.gather())
        with phase("save"):
            saver.finish()
    return progress.step


def begin(
    config: RunConfig, ranks: RankInfo, device: torch.device, newest: Path | None
) -> tuple[Any, RecurrentState, TrainState]:
    """The engine, what is carried from step to step, and how far the run is, as the checkpoint has them."""
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)
    carry = RecurrentState(config, engine.gradient_accumulation_steps(), ranks)
    if newest is None:
        return engine, carry, TrainState()
    progress = resume(engine, newest)
    carry.restore(read_carry(newest), device)
    return engine, carry, progress


@torch.no_grad()
def evaluate(engine: Any, heldout: Iterable[Batch], phase: Phase) -> float:
    """The mean loss in nats on held-out rows of every rank: the same number on all of them."""
    engine.eval()
    losses = []
    for rows in heldout:
        with phase("eval"):
            losses.append(rows.loss(engine)[0])
    engine.train()
    return all_reduce_mean(torch.stack(losses).mean())[0]
