"""The training run: checks before the start, the loop, the learning-rate schedule, evaluation and rollback."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from tostlm.checkpoint import CONFIG, TrainState, checkpoints, read_train_state
from tostlm.checkpoint.layout import read_recurrent_state
from tostlm.checkpoint.load import check_resumable, latest_valid_checkpoint, quarantine, resume
from tostlm.checkpoint.save import CheckpointSaver
from tostlm.config import RunConfig, dump_config, matmul_dtype
from tostlm.data import verify_once
from tostlm.device import best_device, device_name, supports_matmul
from tostlm.errors import EXIT_REQUEUE, UserError
from tostlm.files import lock_for_life, require_writable, write_atomically
from tostlm.launch import RankInfo
from tostlm.model import create_lm
from tostlm.train.batches import Batch, RankBatches, RecurrentState, RunData, open_data
from tostlm.train.engine import (
    StepResult,
    broadcast_from_rank0,
    context_parallel_group,
    evaluate,
    init_distributed,
    learning_rates,
    rank0_first,
    start_engine,
    train_step,
)
from tostlm.train.faults import SpikeDetector, StopRequest
from tostlm.train.metric_writers import check_wandb
from tostlm.train.metrics import Metrics, PhaseTimers, layer_statistics
from tostlm.train.profiler import StepProfiler
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
            done_of_all = f"step {step} of {config.train.steps}"
            print(f"{config.run_dir}: stopped after {done_of_all} ({stop.reason}); the same command resumes")
        raise SystemExit(EXIT_REQUEUE)


def check_run(config: RunConfig, data: RunData) -> Path | None:
    """Check everything about a run that can be wrong before it starts, and prepare `run_dir`. Only rank 0 calls this.

    Returns:
        The checkpoint to resume from; None to start anew.

    Raises:
        UserError: a check failed.
    """
    if not supports_matmul(best_device(), matmul_dtype(config)):
        name = device_name(best_device())
        raise UserError(f"precision is {config.precision}, which {name} cannot multiply in; train in another")
    check_wandb(config)
    require_writable(config.run_dir)
    lock_for_life(
        config.run_dir / ".lock", f"{config.run_dir} is in use by another tostlm train; wait for it or end it"
    )
    clear_heartbeats(config)
    newest = latest_valid_checkpoint(config)
    if newest is not None:
        check_resumable(config, data.tokenizer, newest)
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
    trainer = Trainer(config, data, ranks, device, timers)
    state, stopping = trainer.resume(newest), False
    spikes = SpikeDetector(settings, state.good_losses)

    def due(every_steps: int | None) -> bool:
        return every_steps is not None and (state.step % every_steps == 0 or state.step == steps)

    with (
        Metrics(config, state.step, ranks, timers) as metrics,
        StepProfiler(config, ranks) as profiler,
        CheckpointSaver(config, data.tokenizer, ranks, watchdog.keep_alive) as saver,
        closing(trainer.batches.training(state.data_step)) as batches,
    ):
        while state.step < steps and not stopping:
            with timers("data"):
                batch = next(batches)
            with profiler.step(state.step + 1):
                lr = learning_rate(config, state.step)
                result = trainer.train_step(batch, lr, spikes.is_bad, stop.requested)
            state, stopping = state.advance(result.skipped), result.stop

            if result.skipped:
                metrics.event(state.step, "skipped", loss=result.loss, grad_norm=result.grad_norm)
            if spikes.update(result.loss, result.bad):
                saver.finish()
                state = trainer.roll_back(state, spikes.rollback_failed)
                spikes.rolled_back()
                metrics.rewind(state.step)
                metrics.event(state.step, "rolled back", rollbacks=state.rollbacks)
                continue
            if due(settings.log_every_steps):
                epochs = data.training.epochs(state.data_step)
                metrics.log(state, result, learning_rates(trainer.engine), batch.context, epochs)
            if due(settings.statistics_every_steps):
                metrics.statistics(state.step, trainer.statistics(batch))
            if due(settings.eval_every_steps):
                loss = trainer.evaluate()
                state = state._replace(validation_loss=loss)
                metrics.validation(state.step, loss)
            if (due(settings.save_every_steps) or stopping) and (not result.bad or state.step == steps):
                trainer.save(saver, state._replace(good_losses=spikes.good_losses))
        with timers("save"):
            saver.finish()
    return state.step


class Trainer:
    """The model in training on this rank: its engine, its recurrent state and its batches.

    Every rank has one and calls its methods together with the others.

    Args:
        timers: time the phases forward, backward, step, statistics, eval and save.
    """

    def __init__(
        self, config: RunConfig, data: RunData, ranks: RankInfo, device: torch.device, timers: PhaseTimers
    ) -> None:
        self._config, self._plan, self._ranks, self._device, self._timers = config, data.plan, ranks, device, timers
        self.engine = start_engine(config, create_lm(config.model, config.seed), data.plan, ranks)
        self.recurrent_state = RecurrentState(config, data.plan.accumulation, ranks)
        group = context_parallel_group(config.train.context_parallel_size)
        self.batches = RankBatches(data, ranks, device, group)

    def resume(self, checkpoint: Path | None) -> TrainState:
        """Load a checkpoint, if there is one, and return the progress of the run."""
        if checkpoint is None:
            return TrainState()
        state = resume(self.engine, checkpoint)
        self.recurrent_state.restore(read_recurrent_state(checkpoint), self.engine.module, self._device)
        return state

    def train_step(self, batch: Batch, lr: float, is_bad: Callable[[float], bool], stop: bool) -> StepResult:
        """Make one update from this rank's batch, unless the step is bad; see `tostlm.train.engine.train_step`."""
        micro_batches = batch.split(self._plan.accumulation)
        return train_step(self.engine, micro_batches, lr, is_bad, stop, self.recurrent_state, self._timers)

    def statistics(self, batch: Batch) -> dict[str, float]:
        """Return statistics of the model's layers on this rank's first micro-batch."""
        with self._timers("statistics"):
            return layer_statistics(self.engine, batch.split(self._plan.accumulation)[0])

    def evaluate(self) -> float:
        """Return the mean loss in nats on `train.eval_tokens` validation tokens, the same for any number of ranks."""
        with closing(self.batches.validation()) as batches:
            return evaluate(self.engine, batches, self._timers)

    def save(self, saver: CheckpointSaver, state: TrainState) -> None:
        """Save a checkpoint of the model and the progress of the run."""
        with self._timers("save"):
            saver.save(self.engine, state, self.recurrent_state.gather())

    def roll_back(self, state: TrainState, rollback_failed: bool) -> TrainState:
        """Load the newest checkpoint and return the progress to continue from, which leaves out the data read since.

        Args:
            state: the progress of the run.
            rollback_failed: no step was good since the last rollback, so the newest checkpoint's weights are bad too:
                it is quarantined and the one before it is loaded.

        Raises:
            UserError: on rank 0, if the run has rolled back too often or has no checkpoint.
        """
        checkpoint = broadcast_from_rank0(
            lambda: _choose_rollback_checkpoint(self._config, state, rollback_failed), self._ranks
        )
        saved = resume(self.engine, checkpoint)
        return saved._replace(
            data_step=state.data_step, skipped_steps=state.skipped_steps, rollbacks=state.rollbacks + 1
        )


def _choose_rollback_checkpoint(config: RunConfig, state: TrainState, rollback_failed: bool) -> Path:
    settings, found = config.train, checkpoints(config.run_dir)
    problem = f"the last {settings.bad_steps_before_rollback} losses or gradients up to step {state.step} were bad"
    advice = "lower optimizer.lr or set deepspeed.gradient_clipping, and run the command again"
    if state.rollbacks >= settings.rollbacks_before_stop:
        raise UserError(
            f"{problem} after {state.rollbacks} rollbacks (train.rollbacks_before_stop): training has diverged; "
            f"{advice}: it resumes from the newest checkpoint"
        )
    if rollback_failed and found:
        quarantine(found.pop(), "no step was good after it")
    if not found:
        raise UserError(f"{problem} and there is no checkpoint to roll back to: training has diverged; {advice}")
    return found[-1]


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
