"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint import CONFIG
from tostlm.config import RunConfig, batches, dump_config
from tostlm.data import Loader, common_tokenizer, verify
from tostlm.errors import UserError
from tostlm.files import lock_for_life, require_writable, write_atomically
from tostlm.launch import Ranks
from tostlm.model import create_lm
from tostlm.train.checkpoint import check_resumable, clear_unfinished, last_step, resume, save
from tostlm.train.engine import context_group, join_ranks, start_engine, train_step
from tostlm.train.feed import feed, heldout_loader, training_loader
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
    tokenizer = common_tokenizer([folder for folder, _ in config.data.sets])
    loader, heldout = training_loader(config), heldout_loader(config, ranks.world)
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)
    group = context_group(config.train.context_ranks)
    if step:
        resume(engine, config, step)

    def due(every: int) -> bool:
        return step % every == 0 or step == config.train.steps

    with (
        Metrics(config, step, ranks) as metrics,
        closing(feed(loader, range(step, config.train.steps), ranks, device, group)) as batches_ahead,
    ):
        for rows in batches_ahead:
            lr = learning_rate(config, step)
            update = train_step(engine, rows, lr, group)
            step += 1

            if due(config.train.log_every_steps):
                loss = finite_mean(update.loss, step, ranks)
                context = rows.tokens * config.train.context_ranks
                metrics.train(step, loss, lr, update.grad_norm, context, loader.epochs(step))
            if due(config.train.eval_every_steps):
                own = evaluate(engine, heldout, config.train.eval_tokens, ranks, device, group)
                metrics.heldout(step, finite_mean(own, step, ranks))
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
    folders = [folder for folder, _ in config.data.sets]
    tokenizer = common_tokenizer(folders)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} pieces of the "
            f"tokenizer of {folders[0]}; raise model.vocab_size"
        )
    training_loader(config)
    heldout_loader(config, world_size)
    check_resumable(config, tokenizer, world_size)
    require_writable(config.run_dir)
    lock_for_life(
        config.run_dir / ".lock", f"{config.run_dir} is in use by another tostlm train; wait for it or end it"
    )
    clear_unfinished(config)
    if config.data.verify_checksums:
        for folder in folders:
            for _ in verify(folder):
                pass
    write_atomically(config.run_dir / CONFIG, dump_config(config))
    return last_step(config)


@torch.no_grad()
def evaluate(
    engine: Any,
    heldout: Loader,
    tokens: int,
    ranks: Ranks,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's mean loss in nats on its share of `tokens` held-out tokens, the same every time."""
    passes = heldout.steps_within(tokens)
    engine.eval()
    losses = [rows.loss(engine, group) for rows in feed(heldout, range(passes), ranks, device, group)]
    engine.train()
    return torch.stack(losses).mean()


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
