"""Going on from a checkpoint: the newest that is whole, if it is of this run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tostlm.checkpoint.deepspeed_state import restore_loss_scale, restore_state, state_keys, state_numels
from tostlm.checkpoint.layout import (
    COMPLETE,
    CONFIG,
    PROGRESS,
    STATE,
    STEP,
    TrainState,
    read_state,
    read_train_state,
    step_folders,
)
from tostlm.checkpoint.save import clear_unfinished, data_sha256
from tostlm.config import RunConfig, fixed_keys, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.files import sha256_of

DAMAGED = ".damaged"  # after a checkpoint's name
READERS = 4  # files whose checksums are taken at a time


def latest_valid_checkpoint(config: RunConfig) -> Path | None:
    """The newest checkpoint in the run's folder whose files are those that were written; None if it never saved.

    Newer ones are put aside as step-N.damaged and said on stderr; what a killed save has left is removed. For rank 0,
    which must hold the run's lock.

    Raises:
        UserError: all are damaged, or there are folders of another kind.
    """
    folder = config.run_dir / "checkpoints"
    for stranger in _strangers(config.run_dir):
        raise UserError(
            f"{stranger} is no checkpoint that this version reads; move it elsewhere or choose another run_dir"
        )
    clear_unfinished(config.run_dir)
    for checkpoint in reversed(step_folders(config.run_dir)):
        trouble = damage(checkpoint)
        if trouble is None:
            return checkpoint
        quarantine(checkpoint, trouble)
    if any(folder.glob(f"step-*{DAMAGED}")):
        raise UserError(
            f"every checkpoint in {folder} is damaged; bring a copy of one, or move them elsewhere to start anew"
        )
    return None


def quarantine(checkpoint: Path, trouble: str) -> None:
    """Keep a checkpoint out of the run's way, and say so on stderr."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    checkpoint.rename(aside)
    print(f"tostlm: checkpoint {checkpoint} is damaged ({trouble}) and put aside as {aside.name}", file=sys.stderr)


def _strangers(run_dir: Path) -> Iterator[Path]:
    """Folders among a run's checkpoints that tostlm does not make: they would be taken for lost, and trained anew."""
    for path in sorted((run_dir / "checkpoints").glob("[!.]*")):
        ours = STEP.match(path.name.removesuffix(DAMAGED))
        older = path.suffix != DAMAGED and not (path / COMPLETE).exists() and not (path / STATE).exists()
        if path.is_dir() and (not ours or older):
            yield path


def damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written; None for a whole one. Reads all of it.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        sums = json.loads((checkpoint / COMPLETE).read_text())
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(lambda name: _changed(checkpoint / name, **sums[name]), [CONFIG, PROGRESS, *sums])
            return next(filter(None, found), None)
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (ValueError, TypeError, LookupError):
        return f"{COMPLETE} is not as it was written"
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read: {error.strerror}") from None


def _changed(path: Path, bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != bytes:
        return f"{path.name} has {path.stat().st_size} bytes, not {bytes}"
    return None if sha256_of(path) == sha256 else f"{path.name} has another checksum"


def check_resumable(config: RunConfig, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Compare a checkpoint with what would go on from it. Ranks, ZeRO stage and micro-batch may be others.

    Raises:
        UserError: it is of another model, tokenizer, seed, batch, precision or data.
    """
    folders = ", ".join(map(str, config.data.folders))
    way_out = "choose another run_dir, or put the old value back"
    theirs, ours = _fixed_on_resume(load_config(checkpoint / CONFIG)), _fixed_on_resume(config)
    for key in {**theirs, **ours}:
        if (old := theirs.get(key, "unset")) != (new := ours.get(key, "unset")):
            raise UserError(f"checkpoint {checkpoint} has {key}={old}, this run {key}={new}; {way_out}")
    if Tokenizer.from_folder(checkpoint).sha256 != tokenizer.sha256:
        raise UserError(f"checkpoint {checkpoint} was trained with another tokenizer than {folders}; {way_out}")
    if read_train_state(checkpoint).data_sha256 != data_sha256(config):
        raise UserError(f"checkpoint {checkpoint} was trained on other data than {folders} holds; {way_out}")


def _fixed_on_resume(config: RunConfig) -> dict[str, Any]:
    """Return what a resumed run must share with its checkpoint, so that its losses continue."""
    values = dict(fixed_keys(config))
    model = {f"model.{key}": value for key, value in asdict(values.pop("model")).items()}
    return {**model, **values, "precision": config.precision}


def resume(engine: Any, checkpoint: Path) -> TrainState:
    """Put the engine where a checkpoint was, whatever ranks and ZeRO stage wrote it; every rank must call.

    Raises:
        UserError: this rank does not see it, or it cannot be read.
    """
    if not checkpoint.is_dir():
        raise UserError(
            f"this rank does not see {checkpoint}, which rank 0 does; run_dir must be on a shared file system"
        )
    progress = read_train_state(checkpoint)
    keys = [key for name in state_numels(engine) for key in state_keys(name)]
    restore_state(engine, read_state(checkpoint, keys), progress.optimizer_steps)
    restore_loss_scale(engine, progress.loss_scale)
    engine.global_steps = progress.step  # DeepSpeed's own monitors count by these
    engine.global_samples = progress.step * engine.train_batch_size()
    return progress
