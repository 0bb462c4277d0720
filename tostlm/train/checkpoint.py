"""Saving and resuming a run. What a checkpoint holds is in tostlm/checkpoint.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist

from tostlm.checkpoint import (
    CONFIG,
    ENGINE,
    PROGRESS,
    TOKENIZER,
    WEIGHTS,
    Progress,
    checkpoints,
    read_progress,
)
from tostlm.config import RunConfig, dump_config, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.files import write_atomically
from tostlm.launch import Ranks
from tostlm.train.engine import load_engine, save_engine, whole_weights

PARTIAL = ".saving-"


def save(engine: Any, config: RunConfig, tokenizer: Tokenizer, step: int, ranks: Ranks) -> Path:
    """Write a checkpoint of all ranks and publish it by a rename: a reader finds it whole or not at all.

    Raises:
        UserError: it cannot be written; the run's older checkpoints are untouched.
    """
    final = config.run_dir / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(f"{PARTIAL}{final.name}")
    if ranks.rank == 0:
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        save_engine(engine, partial / ENGINE)
        weights = whole_weights(engine, ranks.rank)
        if ranks.rank == 0:
            progress = Progress(step, step * config.train.batch_tokens, ranks.world, config.zero_stage)
            write_atomically(partial / WEIGHTS, safetensors.torch.save(weights))
            write_atomically(partial / CONFIG, dump_config(config))
            write_atomically(partial / TOKENIZER, tokenizer.model)
            write_atomically(partial / PROGRESS, json.dumps(progress._asdict()) + "\n")
    except OSError as error:
        if ranks.rank == 0:
            clear_unfinished(config)
        raise UserError(
            f"checkpoint {final} cannot be written: {error.strerror}; make room and run the command again, it resumes "
            "from the checkpoint before"
        ) from None
    dist.barrier()
    if ranks.rank == 0:
        partial.replace(final)
        if config.train.keep_last_checkpoints:
            for old in checkpoints(config.run_dir)[: -config.train.keep_last_checkpoints]:
                shutil.rmtree(old)
    dist.barrier()
    return final


def clear_unfinished(config: RunConfig) -> None:
    """Remove what a save that did not end has left."""
    for leftover in (config.run_dir / "checkpoints").glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def last_step(config: RunConfig) -> int:
    """The step of the newest checkpoint in the run's folder, 0 where there is none."""
    found = checkpoints(config.run_dir)
    return read_progress(found[-1]).step if found else 0


def check_resumable(config: RunConfig, tokenizer: Tokenizer, world_size: int) -> None:
    """Compare the newest checkpoint in the run's folder, if there is one, with what would go on from it.

    Raises:
        UserError: that checkpoint is of another model, tokenizer, seed or batch, or of other ranks.
    """
    found = checkpoints(config.run_dir)
    if not found:
        return
    newest = found[-1]
    way_out = "choose another run_dir, or put the old value back"
    ours, theirs = _identity(config), _identity(load_config(newest / CONFIG))
    for key, value in ours.items():
        if value != theirs[key]:
            raise UserError(f"checkpoint {newest} has {key}={theirs[key]}, the config {key}={value}; {way_out}")
    if Tokenizer.load(newest / TOKENIZER).sha256 != tokenizer.sha256:
        raise UserError(f"checkpoint {newest} was trained with another tokenizer than {config.data.path}; {way_out}")
    progress = read_progress(newest)
    written, now = (progress.world_size, progress.zero_stage), (world_size, config.zero_stage)
    if written != now:
        raise UserError(
            f"checkpoint {newest} was written by {written[0]} ranks at ZeRO stage {written[1]}, this run has {now[0]} "
            f"at stage {now[1]}; resume with the same"
        )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint for its losses to continue."""
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        "seed": config.seed,
        "data.context_tokens": config.data.context_tokens,
        "train.batch_tokens": config.train.batch_tokens,
    }


def resume(engine: Any, config: RunConfig) -> int:
    """Load the newest checkpoint in the run's folder into the engine, if there is one; returns the step to go on from.

    Raises:
        UserError: its engine shards cannot be read.
    """
    found = checkpoints(config.run_dir)
    if not found:
        return 0
    newest = found[-1]
    try:
        load_engine(engine, newest / ENGINE)
    except UserError as error:
        raise UserError(f"{error}; remove {newest} to resume from the checkpoint before it") from None
    return last_step(config)
