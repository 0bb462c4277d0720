"""Going back to a checkpoint when a run has gone bad, and leaving out the data that it went bad on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tostlm.checkpoint import TrainState, checkpoints
from tostlm.checkpoint.load import quarantine, resume
from tostlm.config import RunConfig
from tostlm.errors import UserError
from tostlm.launch import RankInfo
from tostlm.train.start import broadcast_from_rank0


def roll_back(
    engine: Any, config: RunConfig, progress: TrainState, ranks: RankInfo, rollback_failed: bool
) -> TrainState:
    """Take the run from where it is, `progress`, back to its newest checkpoint; what it goes on with is new data.

    Where nothing good came of going back before (`rollback_failed`), that checkpoint has weights that are no good: it
    is put aside and the one before it taken. Every rank must call.

    Raises:
        UserError: the run has gone back too often, or there is no checkpoint; said by rank 0.
    """
    checkpoint = broadcast_from_rank0(lambda: _choose(config, progress, rollback_failed), ranks)
    saved = resume(engine, checkpoint)
    return saved._replace(
        data_step=progress.data_step, skipped_steps=progress.skipped_steps, rollbacks=progress.rollbacks + 1
    )


def _choose(config: RunConfig, progress: TrainState, rollback_failed: bool) -> Path:
    settings, found = config.train, checkpoints(config.run_dir)
    trouble = f"the last {settings.bad_steps_before_rollback} losses or gradients up to step {progress.step} were bad"
    way_out = "lower optimizer.lr or set deepspeed.gradient_clipping, and run again"
    if progress.rollbacks >= settings.rollbacks_before_stop:
        raise UserError(
            f"{trouble} after going back {progress.rollbacks} times (train.rollbacks_before_stop): training has "
            f"diverged; {way_out}: it goes on from the newest checkpoint"
        )
    if rollback_failed and found:
        quarantine(found.pop(), "what came of it was bad")
    if not found:
        raise UserError(f"{trouble} and there is no checkpoint to go back to: training has diverged; {way_out}")
    return found[-1]
