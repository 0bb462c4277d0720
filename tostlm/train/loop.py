"""The training loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint import CONFIG
from tostlm.config import RunConfig, batches, dump_config
from tostlm.data import HELDOUT, TRAIN, Loader, TokenSet, load_tokenizer, verify
from tostlm.errors import UserError
from tostlm.files import require_writable, write_atomically
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
    if ranks.rank == 0:  # alone, so that what is wrong is said once
        check_run(config, ranks.world)
    if last_step(config) >= config.train.steps:
        if ranks.rank == 0:
            print(f"{config.run_dir}: finished at step {last_step(config)}; raise train.steps to go on")
        return
    device = join_ranks(ranks)
    tokenizer = load_tokenizer(config.data.path)
    loader = Loader(
        TokenSet(config.data.path, TRAIN),
        config.data.context_tokens,
        batches(config, ranks.world).sequences,
        config.seed,
    )
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)
    step = resume(engine, config)

    with Metrics(config, step, ranks) as metrics:
        while step < config.train.steps:
            tokens, targets = on_device(loader.batch(step, ranks.rank, ranks.world), device)
            lr = learning_rate(config, step)
            update = train_step(engine, tokens, targets, lr)
            step += 1
            last = step == config.train.steps

            if step % config.train.log_every_steps == 0 or last:
                metrics.train(step, mean_over_ranks(update.loss), lr, float(update.grad_norm))
            if step % config.train.eval_every_steps == 0 or last:
                metrics.heldout(step, evaluate(engine, config, ranks, device))
                metrics.restart_clock(step)
            if step % config.train.save_every_steps == 0 or last:
                save(engine, config, tokenizer, step, ranks)
                metrics.restart_clock(step)
    dist.destroy_process_group()


def check_run(config: RunConfig, world_size: int) -> None:
    """Everything about a run that can be wrong before it starts.

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
    clear_unfinished(config)
    if config.data.verify_checksums:
        for _ in verify(config.data.path):
            pass
    write_atomically(config.run_dir / CONFIG, dump_config(config))


@torch.no_grad()
def evaluate(engine: Any, config: RunConfig, ranks: Ranks, device: torch.device) -> float:
    """Mean loss in nats on `train.eval_tokens` of held-out text, the same windows every time."""
    shares = batches(config, ranks.world)
    sequences = shares.micro_sequences * ranks.world
    loader = Loader(TokenSet(config.data.path, HELDOUT), config.data.context_tokens, sequences, config.seed)
    passes = max(1, config.train.eval_tokens // (sequences * config.data.context_tokens))
    engine.eval()
    losses = []
    for index in range(passes):
        tokens, targets = on_device(loader.batch(index, ranks.rank, ranks.world), device)
        losses.append(engine(tokens, targets=targets)[0])
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean())


def on_device(batch: tuple[np.ndarray, np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, targets = (torch.from_numpy(part.copy()).to(device, non_blocking=True) for part in batch)
    return tokens, targets


def mean_over_ranks(value: Tensor) -> float:
    """The mean of one number of each rank, on every rank."""
    total = value.double()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
