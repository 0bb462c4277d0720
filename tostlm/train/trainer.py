"""The training run: checks before the start, the loop, the learning-rate schedule, evaluation and rollback."""

from __future__ import annotations

import math
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from tostlm.checkpoint import CONFIG, TrainState, read_train_state, step_of
from tostlm.checkpoint.branch import branch, require_same_origin
from tostlm.checkpoint.layout import read_recurrent_state
from tostlm.checkpoint.load import check_resumable, latest_valid_checkpoint, resume
from tostlm.checkpoint.rollback import choose_checkpoint, record_rollback
from tostlm.checkpoint.save import CheckpointSaver
from tostlm.config import RunConfig, dump_config, matmul_dtype
from tostlm.data import verify_once
from tostlm.device import best_device, device_name, supports_matmul
from tostlm.errors import EXIT_REQUEUE, UserError
from tostlm.files import lock_for_life, require_writable, write_atomically
from tostlm.launch import RankInfo
from tostlm.train.batches import RankBatches, RecurrentState, RunData, micro_batches, open_data
from tostlm.train.engine import (
    TrainingEngine,
    broadcast_from_rank0,
    context_parallel_group,
    init_distributed,
    rank0_first,
    start_engine,
    train_step,
)
from tostlm.train.faults import SpikeDetector, StopRequest
from tostlm.train.metric_writers import check_wandb
from tostlm.train.metrics import Metrics, PhaseTimers
from tostlm.train.profiler import StepProfiler
from tostlm.train.statistics import UpdateProbe, by_layer, forward_statistics
from tostlm.train.validation import evaluate
from tostlm.train.watchdog import Watchdog, clear_heartbeats


def train(config: RunConfig, ranks: RankInfo) -> None:
    """Train from the newest valid checkpoint in `run_dir`, or from the start, to the last step.

    Every rank calls this.

    Raises:
        UserError: the data, the folder or the checkpoint does not fit the config, or training diverged.
        SystemExit: with `EXIT_REQUEUE` and everything saved, if a rank was asked to stop before the last step.
    """
    device = init_distributed(ranks)
    data = rank0_first(lambda: open_data(config, ranks.world_size), ranks)
    newest = broadcast_from_rank0(lambda: check_run(config, data), ranks)
    done = read_train_state(newest).step if newest is not None else 0
    if done >= config.train.steps:
        if ranks.rank == 0:
            print(f"{config.run_dir}: finished at step {done}; raise train.steps to train longer")
        return
    with StopRequest(config.train.time_limit_minutes) as stop, Watchdog(config, ranks) as watchdog:
        step = run_loop(config, data, ranks, device, newest, stop, watchdog)
        dist.barrier()  # Slurm ends all ranks as soon as one of them exits with a code other than 0
    dist.destroy_process_group()
    if step < config.train.steps:
        if ranks.rank == 0:
            reached = f"step {step} of {config.train.steps} ({stop.reason})"
            print(f"{config.run_dir}: stopped after {reached}; the same command resumes")
        raise SystemExit(EXIT_REQUEUE)


def check_run(config: RunConfig, data: RunData) -> Path | None:
    """Check what can be wrong before a run starts, prepare `run_dir` and return the checkpoint to resume from, if any.

    Only rank 0 calls this.

    Raises:
        UserError: a check failed.
    """
    if not supports_matmul(best_device(), matmul_dtype(config)):
        name = device_name(best_device())
        raise UserError(f"precision is {config.precision}, which {name} cannot multiply in; train in another")
    check_wandb(config)
    monitors = [config.deepspeed.get(name, {}) for name in ("csv_monitor", "tensorboard")]
    outputs = [monitor["output_path"] for monitor in monitors if monitor.get("enabled") and monitor.get("output_path")]
    for folder in (config.run_dir, *map(Path, outputs)):
        require_writable(folder)
    lock_for_life(
        config.run_dir / ".lock", f"{config.run_dir} is in use by another tostlm train; wait for it or end it"
    )
    clear_heartbeats(config)
    newest = latest_valid_checkpoint(config)
    if newest is not None:
        require_same_origin(config, newest)
        check_resumable(config, data.tokenizer, newest)
    elif config.train.branch_from is not None:
        newest = branch(config, data.tokenizer)
        print(f"{config.run_dir}: begins from {config.train.branch_from}, at step {step_of(newest)}")
    if config.data.verify_checksums:
        for folder in config.data.folders:
            verify_once(folder)
    write_atomically(config.run_dir / CONFIG, dump_config(config))
    return newest


def run_loop(
    config: RunConfig,
    data: RunData,
    ranks: RankInfo,
    device: torch.device,
    newest: Path | None,
    stop: StopRequest,
    watchdog: Watchdog,
) -> int:
    """Train from a checkpoint, or from the start, to the last step or a request to stop; return the steps done."""
    settings, steps = config.train, config.train.steps
    timers = PhaseTimers(device, on_phase=lambda phase: watchdog.record_phase(state.step, phase))
    engine = start_engine(config, data.plan, ranks)
    state = TrainState() if newest is None else resume(engine, config, newest)
    recurrent_state = RecurrentState(config, data.plan.accumulation, ranks)
    recurrent_state.restore({} if newest is None else read_recurrent_state(newest), engine.module, device)
    rank_batches = RankBatches(data, ranks, device, context_parallel_group(settings.context_parallel_size))
    probe = UpdateProbe(engine)
    spikes, stopping = SpikeDetector(settings, state.good_losses), False

    def due_at(step: int, every_steps: int | None) -> bool:
        return every_steps is not None and (step % every_steps == 0 or step == steps)

    def due(every_steps: int | None) -> bool:
        return due_at(state.step, every_steps)

    with (
        Metrics(config, state.step, ranks, timers) as metrics,
        StepProfiler(config, ranks) as profiler,
        CheckpointSaver(config, data.tokenizer, ranks, watchdog.wait_for_files) as saver,
        closing(rank_batches.training(state.data_step)) as batches,
    ):
        while state.step < steps and not stopping:
            with timers("data"):
                parts = micro_batches(next(batches), config)
            measured = due_at(state.step + 1, settings.statistics_every_steps)
            engine.guard.around_update = probe.start() if measured else nullcontext
            with profiler.step(state.step + 1):
                lr = learning_rate(config, state.step)
                result = train_step(engine, parts, lr, spikes.is_bad, stop.requested, recurrent_state, timers)
            # After a bad step there is nothing good to save: a request to stop is honoured at the next good one.
            state, stopping = state.advance(result.skipped), result.stop and not result.bad

            if result.skipped:
                metrics.event(state.step, "skipped", loss=result.loss, grad_norm=result.grad_norm)
            if spikes.update(result.loss, result.bad):
                saver.finish()
                state = roll_back(engine, config, state, spikes.rollbacks_in_a_row > 1, ranks)
                stopping = result.stop  # with the rollback recorded, everything is saved
                metrics.rewind(state.step)
                metrics.event(state.step, "rolled back", rollbacks=state.rollbacks)
                continue
            if result.bad and spikes.rollbacks_in_a_row and state.step < steps:
                continue  # nothing is reported or saved until the rollback has helped
            if due(settings.log_every_steps):
                context = parts[0].inputs.shape[1] * settings.context_parallel_size
                epochs = data.training.epochs(state.data_step)
                metrics.log(state, result, lr, engine.optimizer.param_groups, context, epochs)
            if due(settings.statistics_every_steps):
                movements = probe.movements()
                of_layers = forward_statistics(engine, parts[0], timers)
                metrics.statistics(state.step, {**of_layers, **by_layer(movements)})
                if suspects := probe.suspects(movements):
                    metrics.event(state.step, "parameters", **suspects)
            if due(settings.eval_every_steps):
                found = evaluate(engine, data.held_out, rank_batches, data.tokenizer, timers)
                state = state._replace(validation_loss=found["loss"])
                metrics.validation(state.step, found)
                if state.step == steps and not math.isfinite(found["loss"]):
                    saver.finish()
                    broadcast_from_rank0(partial(report_divergence, steps), ranks)
            if (due(settings.save_every_steps) or stopping) and (not result.bad or state.step == steps):
                with timers("save"):
                    saver.save(engine, state._replace(good_losses=tuple(spikes.good_losses)), recurrent_state.gather())
        with timers("save"):
            saver.finish()
    return state.step


def roll_back(
    engine: TrainingEngine, config: RunConfig, state: TrainState, failed: bool, ranks: RankInfo
) -> TrainState:
    """Load an earlier checkpoint and return the progress to continue from, which leaves out the data read since.

    Every rank must call this. `failed` says that no step was good since the last rollback.

    Raises:
        UserError: on rank 0, if the run has rolled back too often or has no checkpoint.
    """
    checkpoint = broadcast_from_rank0(lambda: choose_checkpoint(config, state, failed), ranks)
    saved = resume(engine, config, checkpoint)
    state = saved._replace(data_step=state.data_step, skipped_steps=state.skipped_steps, rollbacks=state.rollbacks + 1)
    broadcast_from_rank0(lambda: record_rollback(config.run_dir, state), ranks)
    return state


def report_divergence(step: int) -> NoReturn:
    """Raise the UserError of a run whose last step is no better than the checkpoint before it."""
    raise UserError(
        f"the validation loss of the last step, {step}, is not finite: training has diverged, and the step is not "
        "saved; lower optimizer.lr or set deepspeed.gradient_clipping, and run the command again: it resumes from the "
        "newest checkpoint"
    )


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of the update that follows `step` finished steps.

    Linear warm-up, then with schedule cosine a cosine from lr to min_lr over the rest of the run (Loshchilov and Hutter
    2017, arXiv 1608.03983); with wsd a plateau and a linear decay over the last `decay_steps` (Hu et al. 2024, arXiv
    2404.06395).
    """
    optimizer, steps = config.optimizer, config.train.steps
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "cosine":
        progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        assert optimizer.decay_steps is not None
        share = min(1.0, max(0.0, (steps - step) / optimizer.decay_steps))
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)
