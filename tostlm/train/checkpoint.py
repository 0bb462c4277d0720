"""Saving and resuming a run. What a checkpoint holds is in tostlm/checkpoint.py."""

from __future__ import annotations

import hashlib
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
    WEIGHTS,
    Progress,
    checkpoint_folder,
    checkpoints,
    read_progress,
)
from tostlm.config import RunConfig, dump_config, load_config
from tostlm.data import Tokenizer, read_manifest
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
    final = checkpoint_folder(config.run_dir, step)
    partial = final.with_name(f"{PARTIAL}{final.name}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_engine(engine, partial / ENGINE)
        weights = whole_weights(engine, ranks.rank)
        if ranks.rank == 0:
            progress = Progress(step, ranks.world, _data_sha256(config))
            write_atomically(partial / WEIGHTS, safetensors.torch.save(weights))
            write_atomically(partial / CONFIG, dump_config(config))
            write_atomically(partial / tokenizer.file_name, tokenizer.content)
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
    newest, folders = found[-1], ", ".join(str(folder) for folder, _ in config.data.sets)
    way_out = "choose another run_dir, or put the old value back"
    saved, progress = load_config(newest / CONFIG), read_progress(newest)
    theirs = _identity(saved, progress.world_size)
    for key, value in _identity(config, world_size).items():
        if value != theirs[key]:
            raise UserError(f"checkpoint {newest} has {key}={theirs[key]}, this run {key}={value}; {way_out}")
    if Tokenizer.of_folder(newest).sha256 != tokenizer.sha256:
        raise UserError(f"checkpoint {newest} was trained with another tokenizer than {folders}; {way_out}")
    if progress.data_sha256 != _data_sha256(config):
        raise UserError(f"checkpoint {newest} was trained on other data than {folders} holds; {way_out}")


def _data_sha256(config: RunConfig) -> str:
    contents = [read_manifest(folder).content_sha256 for folder, _ in config.data.sets]
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def _identity(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint for its losses to continue."""
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        "seed": config.seed,
        "data weights": [weight for _, weight in config.data.sets],
        "data.context_tokens": config.data.context_tokens,
        "data.curriculum": [(stage.until_step, stage.context_tokens) for stage in config.data.curriculum],
        "data.reset_at_documents": config.data.reset_at_documents,
        "data.within_documents": config.data.within_documents,
        "train.batch_tokens": config.train.batch_tokens,
        "precision": config.precision,
        "ZeRO stage": config.zero_stage,
        "ranks": world_size,
    }


def resume(engine: Any, config: RunConfig, step: int) -> None:
    """Load the checkpoint of a step into the engine; every rank must call.

    Raises:
        UserError: this rank does not see it, or it cannot be read.
    """
    folder = checkpoint_folder(config.run_dir, step)
    if not folder.is_dir():
        raise UserError(f"this rank does not see {folder}, which rank 0 does; run_dir must be on a shared file system")
    try:
        load_engine(engine, folder / ENGINE)
    except UserError as error:
        raise UserError(f"{error}; remove {folder} to resume from the checkpoint before it") from None
