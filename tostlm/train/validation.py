"""What a run is evaluated on while it trains, and the numbers that come of it: the same on any number of ranks.

Shapes: B sequences, T tokens of each on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.config import BatchPlan, RunConfig
from tostlm.data import VALIDATION, Loader, NumpyBatch, Targets, Tokenizer, TokenSet, choose_targets
from tostlm.errors import UserError
from tostlm.files import distinct_names
from tostlm.model import IGNORE, perplexity
from tostlm.train.batches import Batch, RankBatches
from tostlm.train.engine import Timer, TrainingEngine, compute_loss


class HeldOut(NamedTuple):
    """Held-out sequences of one prepared folder, all of one length."""

    folder: str  # its name
    context: int | None  # tokens before the scored ones, of sequences that end alike at every context; else None
    sequences: int
    rows: int  # sequences that a group of ranks reads at once
    read: Callable[[int], NumpyBatch]  # a sequence [1, T] by its number


def open_held_out(config: RunConfig, loader: Loader, plan: BatchPlan) -> list[HeldOut]:
    """Return what an evaluation reads: of `loader` about `train.eval_tokens` tokens, and as many at each other context.

    Raises:
        UserError: no held-out document is as long as `train.eval_contexts` ask.
    """
    found = []
    by_folder: dict[str, list[int]] = {}
    for number in range(loader.steps_within(config.train.eval_tokens)):
        by_folder.setdefault(loader.set_name(number), []).append(number)
    for folder, numbers in by_folder.items():
        read = partial(_read_numbered, loader, numbers)
        found.append(HeldOut(folder, None, len(numbers), plan.micro_sequences, read))
    return found + list(_open_contexts(config, plan))


def _open_contexts(config: RunConfig, plan: BatchPlan) -> Iterator[HeldOut]:
    contexts, folders = sorted(set(config.train.eval_contexts)), config.data.folders
    if not contexts:
        return
    windows = max(1, config.train.eval_tokens // max(contexts) // len(folders))
    chosen, errors = [], []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        tokens = TokenSet(folder, VALIDATION)
        try:
            chosen.append((name, tokens, choose_targets(tokens, contexts, windows)))
        except UserError as error:  # of a blend some folders may have short documents alone
            errors.append(error)
    if not chosen:
        raise UserError(f"train.eval_contexts: {errors[0]}")
    pass_tokens = plan.micro_sequences * config.data.context_tokens
    for context in contexts:
        for name, tokens, targets in chosen:
            read = partial(_read_window, tokens, targets, context)
            yield HeldOut(name, context, len(targets.ends), max(1, pass_tokens // context), read)


def _read_numbered(loader: Loader, numbers: Sequence[int], index: int) -> NumpyBatch:
    return loader.batch(numbers[index], 0, 1)


def _read_window(tokens: TokenSet, targets: Targets, context: int, index: int) -> NumpyBatch:
    end = targets.ends[index]
    row = tokens.read(end - context - 1, end).astype(np.int64)[None]
    scored = row[:, 1:].copy()
    scored[:, : -targets.span] = IGNORE
    return NumpyBatch(row[:, :-1], scored, None)


class Scores(NamedTuple):
    """What the predictions of some tokens add up to."""

    nats: float
    tokens: int
    text_bytes: int

    def numbers(self, name: str) -> dict[str, float]:
        """Return the mean loss in nats and the bits per byte, by names that `name` is put into."""
        bits = self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan
        return {f"loss{name}": self.nats / self.tokens, f"bits_per_byte{name}": bits}


@torch.no_grad()
def validate(
    engine: TrainingEngine, held_out: Sequence[HeldOut], batches: RankBatches, tokenizer: Tokenizer, timer: Timer
) -> dict[str, float]:
    """Score the held-out sequences and return the numbers by name. Every rank must call this.

    `loss`, in nats, `perplexity` and `bits_per_byte` are of the run's own sequences, `loss_at_N` and
    `bits_per_byte_at_N` of the same tokens at each N of `train.eval_contexts`. Where several folders are blended, there
    is one of each folder too, with /FOLDER behind. Every token counts once, however they are distributed over ranks.
    """
    engine.eval()
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(engine.device)
    sums = []
    for part in held_out:
        with closing(batches.held_out(part.read, part.sequences, part.rows)) as read:
            sums.append(torch.stack([_score(engine, batch, token_bytes, timer) for batch in read]).sum(0))
    engine.train()
    total = torch.stack(sums)
    dist.all_reduce(total)
    return _summary(held_out, [Scores(nats, int(n), int(size)) for nats, n, size in total.tolist()])


def _score(engine: TrainingEngine, batch: Batch, token_bytes: Tensor, timer: Timer) -> Tensor:
    """Return the summed loss in nats, the scored tokens and their bytes of text [3], float64."""
    with timer("eval"):
        scored = batch.targets != IGNORE
        loss, _ = compute_loss(engine, batch)
        tokens, text_bytes = scored.sum(), (token_bytes[batch.targets.where(scored, 0)] * scored).sum()
        return torch.stack([loss.double() * tokens, tokens.double(), text_bytes.double()])


def _summary(held_out: Sequence[HeldOut], scores: Sequence[Scores]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for context in dict.fromkeys(part.context for part in held_out):
        own = {part.folder: each for part, each in zip(held_out, scores, strict=True) if part.context == context}
        place = "" if context is None else f"_at_{context}"
        whole = Scores(*(sum(column) for column in zip(*own.values(), strict=True)))
        numbers |= whole.numbers(place)
        for folder, each in own.items() if len(own) > 1 else ():
            numbers |= each.numbers(f"{place}/{folder}")
    return {"loss": numbers["loss"], "perplexity": perplexity(numbers["loss"]), **numbers}
