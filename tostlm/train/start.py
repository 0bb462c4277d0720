"""What is settled before the first step: by rank 0, for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from tostlm.checkpoint import CONFIG
from tostlm.checkpoint.load import check_resumable, latest_valid_checkpoint
from tostlm.config import RunConfig, batch_plan, dump_config, matmul_dtype
from tostlm.data import common_tokenizer, verify_once
from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.files import lock_for_life, require_writable, write_atomically
from tostlm.launch import RankInfo
from tostlm.model import best_device, device_name, supports_matmul
from tostlm.train.batches import training_loader, validation_loader
from tostlm.train.wandb import check_wandb
from tostlm.train.watchdog import clear_heartbeats

T = TypeVar("T")


def broadcast_from_rank0(decide: Callable[[], T], ranks: RankInfo) -> T:
    """What rank 0 decides, on every rank. Its error ends all of them, and is said once."""
    decision: list[tuple[T] | None] = [None]
    try:
        if ranks.rank == 0:
            decision = [(decide(),)]
    finally:
        dist.broadcast_object_list(decision, src=0)
    if decision[0] is None:
        raise SystemExit(EXIT_USER_ERROR)
    return decision[0][0]


def check_run(config: RunConfig, world_size: int) -> Path | None:
    """Everything about a run that can be wrong before it starts; returns the checkpoint to go on from, if any.

    Raises:
        UserError: something is.
    """
    batch_plan(config, world_size)
    if not supports_matmul(best_device(), matmul_dtype(config)):
        name = device_name(best_device())
        raise UserError(f"precision is {config.precision}, which {name} cannot multiply in; train in another")
    check_wandb(config)
    tokenizer = common_tokenizer(config.data.folders, config.model.vocab_size)
    training_loader(config)
    validation_loader(config, world_size)
    require_writable(config.run_dir)
    lock_for_life(
        config.run_dir / ".lock", f"{config.run_dir} is in use by another tostlm train; wait for it or end it"
    )
    clear_heartbeats(config)
    newest = latest_valid_checkpoint(config)
    if newest is not None:
        check_resumable(config, tokenizer, newest)
    if config.data.verify_checksums:
        for folder in config.data.folders:
            verify_once(folder)
    write_atomically(config.run_dir / CONFIG, dump_config(config))
    return newest
