"""Rollbacks: which checkpoint a run continues from after bad steps, and the record that lets it survive a restart.

Nothing is wrong with the checkpoints that a rollback passes over: they stay where they are until a later one is saved,
and then get another name, under which they can still be evaluated or converted.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tostlm.checkpoint.layout import TrainState, checkpoints, step_folders, step_of
from tostlm.config import RunConfig
from tostlm.errors import UserError, error_summary, report
from tostlm.files import write_atomically

RECORD = "rollback.json"  # beside the checkpoints, from a rollback to the next checkpoint that is saved
PASSED_OVER = ".passed-over"  # suffix of the name of a checkpoint that the run no longer follows from


def choose_checkpoint(config: RunConfig, state: TrainState, failed: bool) -> Path:
    """Return the checkpoint to roll back to: the newest, or the one before the last rollback's if that one `failed`.

    Args:
        state: the progress of the run, after its bad steps.
        failed: no step was good since the last rollback.

    Raises:
        UserError: the run has rolled back too often, or there is no checkpoint. The record is removed, so that the run
            resumes from its newest checkpoint once the user has changed something.
    """
    settings, last = config.train, read_record(config.run_dir)
    problem = f"the last {settings.bad_steps_before_rollback} losses or gradients up to step {state.step} were bad"
    advice = "lower optimizer.lr or set deepspeed.gradient_clipping, and run the command again"
    below = sys.maxsize if last is None else last.step + (0 if failed else 1)
    found = [path for path in checkpoints(config.run_dir) if step_of(path) < below]
    if state.rollbacks < settings.rollbacks_before_stop and found:
        return found[-1]
    _record_file(config.run_dir).unlink(missing_ok=True)
    if state.rollbacks < settings.rollbacks_before_stop:
        raise UserError(f"{problem} and there is no checkpoint to roll back to: training has diverged; {advice}")
    raise UserError(
        f"{problem} after {state.rollbacks} rollbacks (train.rollbacks_before_stop): training has diverged; {advice}: "
        "it resumes from the newest checkpoint"
    )


def record_rollback(run_dir: Path, state: TrainState) -> None:
    """Record the progress that a run continues from after a rollback, so that a kill does not undo it."""
    write_atomically(_record_file(run_dir), state.to_json())


def read_record(run_dir: Path) -> TrainState | None:
    """Return the progress after the last rollback; None if there was none since the last checkpoint was saved.

    Raises:
        UserError: its record is damaged.
    """
    file = _record_file(run_dir)
    try:
        return TrainState.from_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}, the record of a rollback, cannot be read ({error_summary(error)}); remove it, and the run "
            "resumes from the newest checkpoint as if it had not rolled back"
        ) from None


def following_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of checkpoints that the run may resume from, oldest first: none that were passed over."""
    folders, last = step_folders(run_dir), read_record(run_dir)
    return [path for path in folders if last is None or step_of(path) <= last.step] or folders


def apply_record(run_dir: Path, state: TrainState) -> TrainState:
    """Return a checkpoint's progress as the last rollback left it, if the run continues from that rollback."""
    last = read_record(run_dir)
    if last is None or last.step < state.step:
        return state
    return state._replace(data_step=last.data_step, skipped_steps=last.skipped_steps, rollbacks=last.rollbacks)


def settle_rollback(run_dir: Path, saved: Path) -> None:
    """After a checkpoint was `saved`, rename those that the last rollback passed over, and remove its record.

    Raises:
        OSError: that cannot be done.
    """
    last = read_record(run_dir)
    if last is None:
        return
    for path in step_folders(run_dir):
        if step_of(path) > last.step and path != saved:
            renamed = path.with_name(path.name + PASSED_OVER)
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
            report(f"{path} is now {renamed.name}: the run continues from step {last.step}")
    _record_file(run_dir).unlink(missing_ok=True)


def _record_file(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / RECORD
