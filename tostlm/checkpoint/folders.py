"""The folders of a run's checkpoints: which appear at once, which are kept, and how others are deleted."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tostlm.checkpoint.integrity import CONFIG, Checksum, find_damage
from tostlm.checkpoint.layout import STATE, checkpoints, read_train_state, step_of
from tostlm.checkpoint.state_files import write_checksums
from tostlm.config import RunConfig, load_config
from tostlm.errors import UserError, report
from tostlm.files import locked, sync_folder, write_atomically

LATEST = "latest"
DAMAGED = ".damaged"  # suffix of a quarantined checkpoint's name
PARTIAL, REMOVED = ".saving-", ".removing-"  # prefixes of a checkpoint's name before it is published, and when deleted


def publish(partial: Path, folder: Path, checksums: Mapping[str, Checksum]) -> None:
    """Rename a folder of written files to a checkpoint, which readers see completely or not at all, even after a crash.

    Raises:
        OSError: it cannot be written.
    """
    for done in partial.glob(".rank-*"):
        done.unlink()
    write_checksums(partial, checksums)
    sync_folder(partial / STATE)
    sync_folder(partial)
    if folder.exists():  # of the same step, before a rollback
        remove_checkpoint(folder)
    partial.replace(folder)
    sync_folder(folder.parent)
    write_atomically(folder.parent / LATEST, f"{folder.name}\n")


def prune(config: RunConfig) -> None:
    """Delete the checkpoints that the config does not keep, and what an earlier deletion left.

    What cannot be deleted is reported on stderr and tried again after the next save: it never ends a run.
    """
    folder = config.run_dir / "checkpoints"
    try:
        for leftover in folder.glob(f"{REMOVED}*"):
            _delete(leftover)
        for expired in expired_checkpoints(config, checkpoints(config.run_dir)):
            remove_checkpoint(expired)
    except OSError as error:
        where = error.filename or folder
        report(f"{where} cannot be deleted yet ({error.strerror or error}); the next save tries again")


def prune_run(
    run_dir: Path, keep_last: int, keep_every: int | None, keep_best: bool, dry_run: bool = False
) -> list[Path]:
    """Delete the checkpoints of a run that is not training but for some, and return them.

    Args:
        keep_last, keep_every, keep_best: as the config's train.keep_last_checkpoints and the like.
        dry_run: delete none.

    Raises:
        UserError: there is none, the run is training, or one cannot be deleted.
    """
    if not (found := checkpoints(run_dir)):
        raise UserError(f"{run_dir} is not the folder of a run that saved a checkpoint")
    config = load_config(run_dir / CONFIG if (run_dir / CONFIG).is_file() else found[-1] / CONFIG)
    kept = {
        "keep_last_checkpoints": keep_last,
        "keep_every_steps": keep_every,
        "keep_best_checkpoint": keep_best,
    }
    config = config.model_copy(update={"train": config.train.model_copy(update=kept)})
    try:
        with locked(run_dir / ".lock", f"{run_dir} is in use by a tostlm train; wait for it or end it"):
            expired = expired_checkpoints(config, found)
            for folder in found:
                if folder not in expired and (damage := find_damage(folder)) is not None:
                    raise UserError(f"{folder}, which would be kept, is damaged: {damage}; move it elsewhere first")
            for folder in [] if dry_run else expired:
                remove_checkpoint(folder)
            return expired
    except OSError as error:
        raise UserError(f"{error.filename or run_dir} cannot be deleted: {error.strerror or error}") from None


def expired_checkpoints(config: RunConfig, found: Sequence[Path]) -> list[Path]:
    """Return which checkpoints, of those `found` oldest first, the config does not keep."""
    train = config.train
    if train.keep_last_checkpoints is None:
        return []
    kept = set(found[-train.keep_last_checkpoints :])
    if train.keep_every_steps:
        kept |= {folder for folder in found if step_of(folder) % train.keep_every_steps == 0}
    if train.keep_best_checkpoint and (losses := _validation_losses(found)):
        kept.add(min(losses, key=lambda folder: losses[folder]))  # of equals the oldest, nearest to its evaluation
    return [folder for folder in found if folder not in kept]


def _validation_losses(found: Sequence[Path]) -> dict[Path, float]:
    """Return the validation loss of each checkpoint that has one; one that cannot be read has none."""
    losses = {}
    for folder in found:
        with suppress(UserError):
            loss = read_train_state(folder).validation_loss
            if loss is not None and math.isfinite(loss):
                losses[folder] = loss
    return losses


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that no reader finds it in part.

    Raises:
        OSError: it cannot be deleted.
    """
    hidden = folder.with_name(f"{REMOVED}{folder.name}")
    folder.rename(hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # of a link, what it leads to is the user's
        path.unlink()


def remove_unfinished(run_dir: Path) -> None:
    """Remove what an interrupted save or deletion has left."""
    for prefix in (PARTIAL, REMOVED, f".{LATEST}.partial-"):
        for leftover in (run_dir / "checkpoints").glob(f"{prefix}*"):
            _delete(leftover)


def partial_folder(folder: Path) -> Path:
    """Return the folder that holds a checkpoint's files until it is published."""
    return folder.with_name(f"{PARTIAL}{folder.name}")
