"""Resuming a run: the newest valid checkpoint in its folder, whether it fits the config, and loading it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tostlm.checkpoint.deepspeed_state import DeepSpeedEngine, restore_loss_scale, restore_state, state_elements
from tostlm.checkpoint.folders import DAMAGED, remove_unfinished
from tostlm.checkpoint.integrity import COMPLETE, CONFIG, find_damage
from tostlm.checkpoint.layout import (
    STATE,
    STEP,
    TrainState,
    checkpoint_folder,
    data_sha256,
    read_state,
    read_train_state,
    step_of,
)
from tostlm.checkpoint.rollback import PASSED_OVER, apply_record, following_checkpoints
from tostlm.config import RunConfig, fixed_values, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError, report
from tostlm.optim import EMA


def latest_valid_checkpoint(config: RunConfig) -> Path | None:
    """Return the newest checkpoint in the run's folder whose files match their checksums; None if it has none yet.

    Damaged ones are quarantined, and what an interrupted save has left is removed. Only for rank 0 while it holds the
    run's lock.

    Raises:
        UserError: all checkpoints are damaged, the newest is of another step than its name says, or tostlm did not
            write what is there.
    """
    folder = config.run_dir / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; move it elsewhere or choose another run_dir")
    for path in sorted(folder.glob("[!.]*")):
        if (path.is_dir() or STEP.match(path.name)) and not _is_recognized(path):
            raise UserError(
                f"{path} is no checkpoint that this version reads; move it elsewhere or choose another run_dir"
            )
    remove_unfinished(config.run_dir)
    for checkpoint in reversed(following_checkpoints(config.run_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            _require_own_name(config.run_dir, checkpoint)
            return checkpoint
        quarantine(checkpoint, damage)
    if any(folder.glob(f"step-*{DAMAGED}")):
        raise UserError(
            f"every checkpoint in {folder} is damaged; bring a copy of one, or move them elsewhere to start anew"
        )
    return None


def _require_own_name(run_dir: Path, checkpoint: Path) -> None:
    step = read_train_state(checkpoint).step
    if step != step_of(checkpoint):
        name = checkpoint_folder(run_dir, step).name
        raise UserError(f"{checkpoint} holds the checkpoint of step {step}; rename it to {name}, or move it elsewhere")


def quarantine(checkpoint: Path, reason: str) -> None:
    """Rename a checkpoint to step-N.damaged, so that no run resumes from it, and report it on stderr."""
    renamed = checkpoint.with_name(checkpoint.name + DAMAGED)
    if renamed.exists():
        shutil.rmtree(renamed)
    checkpoint.rename(renamed)
    report(f"checkpoint {checkpoint} is quarantined as {renamed.name}: {reason}")


def _is_recognized(folder: Path) -> bool:
    """Return whether tostlm wrote a folder among checkpoints; a run must not start anew beside others."""
    if not STEP.match(folder.name.removesuffix(DAMAGED).removesuffix(PASSED_OVER)):
        return False
    return folder.suffix in (DAMAGED, PASSED_OVER) or (folder / COMPLETE).exists() or (folder / STATE).exists()


def check_resumable(config: RunConfig, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Check that a run with this config may resume from a checkpoint. Ranks, ZeRO stage and micro-batch may differ.

    Raises:
        UserError: the model, tokenizer, seed, batch, precision or data differ.
    """
    folders = ", ".join(map(str, config.data.folders))
    advice = "choose another run_dir, or put the old value back"
    saved, current = fixed_values(load_config(checkpoint / CONFIG)), fixed_values(config)
    for key in {**saved, **current}:
        if (old := saved.get(key, "unset")) != (new := current.get(key, "unset")):
            raise UserError(f"checkpoint {checkpoint} has {key}={old}, this run {key}={new}; {advice}")
    if Tokenizer.from_folder(checkpoint).sha256 != tokenizer.sha256:
        raise UserError(f"checkpoint {checkpoint} was trained with another tokenizer than {folders}; {advice}")
    if read_train_state(checkpoint).data_sha256 != data_sha256(config):
        raise UserError(f"checkpoint {checkpoint} was trained on other data than {folders} holds; {advice}")


def resume(engine: DeepSpeedEngine, config: RunConfig, checkpoint: Path) -> TrainState:
    """Load a checkpoint of any ranks and ZeRO stage, and return the run's progress. Every rank must call this.

    Raises:
        UserError: this rank does not see the checkpoint, or cannot read it.
    """
    if not checkpoint.is_dir():
        raise UserError(
            f"this rank does not see {checkpoint}, which rank 0 does; run_dir must be on a shared file system"
        )
    train_state = apply_record(checkpoint.parent.parent, read_train_state(checkpoint))
    elements, average = state_elements(engine), engine.weight_average
    if train_state.ema_updates is None:
        elements = {key: own for key, own in elements.items() if not key.endswith(f"/{EMA}")}
    if train_state.optimizer_steps == 0:  # moments before the first update are zero, and need not be saved
        elements = {key: own for key, own in elements.items() if key.endswith(("/weight", f"/{EMA}"))}
    restore_state(engine, read_state(checkpoint, elements), train_state.optimizer_steps)
    if average is not None and train_state.ema_updates is not None:
        average.updates = train_state.ema_updates
    elif average is not None:
        average.restart()
    restore_loss_scale(engine, train_state.loss_scale)
    engine.global_steps = train_state.step  # DeepSpeed's own monitors count by these
    sequences = config.tokens_after(train_state.step) // config.data.context_tokens
    engine.global_samples = sequences * config.train.context_parallel_size  # as `deepspeed_dict` has it
    return train_state
