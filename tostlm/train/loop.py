"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint import CONFIG
from tostlm.config import RunConfig, batches, dump_config
from tostlm.data import HELDOUT, TRAIN, Loader, TokenSet, load_tokenizer, verify
from tostlm.errors import UserError
from tostlm.files import lock_for_life, require_writable, write_atomically
from tostlm.launch import Ranks
from tostlm.model import create_lm
from tostlm.train.checkpoint import check_resumable, clear_unfinished, last_step, resume, save
from tostlm.train.engine import join_ranks, start_engine, train_step
from tostlm.train.metrics import Metrics
from tostlm.train.schedule import learning_rate


def train(config: RunConfig, ranks: Ranks) -> None:
    """Train from the newest checkpoint of the run's folder, or from the start, to the last step. Every rank calls it.

    Raises:
        UserError: the data, the folder or the checkpoint does not fit the config.
    """
    device = join_ranks(ranks)
    step = agree(lambda: check_run(config, ranks.world), ranks)
    if step >= config.train.steps:
        if ranks.rank == 0:
            print(f"{config.run_dir}: finished at step {step}; raise train.steps to go on")
        return
    tokenizer = load_tokenizer(config.data.path)
    loader = Loader(
        TokenSet(config.data.path, TRAIN),
        config.data.context_tokens,
        batches(config, ranks.world).sequences,
        config.seed,
    )
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)
    if step:
        resume(engine, config, step)

    def due(every: int) -> bool:
        return step % every == 0 or step == config.train.steps

    with Metrics(config, step, ranks) as metrics:
        while step < config.train.steps:
            tokens, targets = on_device(loader.batch(step, ranks.rank, ranks.world), device)
            lr = learning_rate(config, step)
            update = train_step(engine, tokens, targets, lr)
            step += 1

            if due(config.train.log_every_steps):
                metrics.train(step, finite_mean(update.loss, step, ranks), lr, update.grad_norm)
            if due(config.train.eval_every_steps):
                metrics.heldout(step, finite_mean(evaluate(engine, config, ranks, device), step, ranks))
                metrics.restart_clock(step)
            if due(config.train.save_every_steps):
                finite_mean(update.loss, step, ranks)
                save(engine, config, tokenizer, step, ranks)
                metrics.restart_clock(step)
    dist.destroy_process_group()


def agree(decide: Callable[[], int], ranks: Ranks) -> int:
    """A number that rank 0 decides on. Its error ends every rank, and is said once."""
    decision: list[int | None] = [None]
    try:
        if ranks.rank == 0:
            decision = [decide()]
    finally:
        dist.broadcast_object_list(decision, src=0)
    if decision[0] is None:
        raise SystemExit(2)
    return decision[0]


def check_run(config: RunConfig, world_size: int) -> int:
    """Everything about a run that can be wrong before it starts; returns the step to go on from.

    Raises:
        UserError: something is.
    """
    batches(config, world_size)
    tokenizer = load_tokenizer(config.data.path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} pieces of the "
            f"tokenizer of {config.data.path}; raise model.vocab_size"
        )
    for split in (TRAIN, HELDOUT):
        Loader(TokenSet(config.data.path, split), config.data.context_tokens, 1, config.seed)
    check_resumable(config, tokenizer, world_size)
    require_writable(config.run_dir)
    lock_for_life(
        config.run_dir / ".lock", f"{config.run_dir} is in use by another tostlm train; wait for it or end it"
    )
    clear_unfinished(config)
    if config.data.verify_checksums:
        for _ in verify(config.data.path):
            pass
    write_atomically(config.run_dir / CONFIG, dump_config(config))
    return last_step(config)


@torch.no_grad()
def evaluate(engine: Any, config: RunConfig, ranks: Ranks, device: torch.device) -> Tensor:
    """This rank's mean loss in nats on its share of `train.eval_tokens` of held-out text, the same every time."""
    shares = batches(config, ranks.world)
    sequences = shares.micro_sequences * ranks.world
    loader = Loader(TokenSet(config.data.path, HELDOUT), config.data.context_tokens, sequences, config.seed)
    passes = min(config.train.eval_tokens // config.data.context_tokens, loader.windows) // sequences
    engine.eval()
    losses = []
    for index in range(max(1, passes)):
        tokens, targets = on_device(loader.batch(index, ranks.rank, ranks.world), device)
        losses.append(engine(tokens, targets=targets)[0])
    engine.train()
    return torch.stack(losses).mean()


def on_device(batch: tuple[np.ndarray, np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, targets = (torch.from_numpy(part.copy()).to(device, non_blocking=True) for part in batch)
    return tokens, targets


def finite_mean(loss: Tensor, step: int, ranks: Ranks) -> float:
    """The mean of a loss of each rank, on every rank.

    Raises:
        UserError: it is no number; said by rank 0.
    """
    total = loss.to(torch.float64, copy=True)
    dist.all_reduce(total)
    mean = float(total) / ranks.world
    if math.isfinite(mean):
        return mean
    if ranks.rank:
        raise SystemExit(2)
    raise UserError(
        f"the loss is {mean} at step {step}: training has diverged; lower optimizer.lr or set "
        "deepspeed.gradient_clipping, and run again: it goes on from the last checkpoint"
    )
