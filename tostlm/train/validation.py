"""Evaluation of a run while it trains: the same numbers on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint.deepspeed_state import averaged_weights
from tostlm.data import Tokenizer
from tostlm.model import IGNORE, perplexity
from tostlm.optim import EMA
from tostlm.train.batches import Batch, RankBatches
from tostlm.train.engine import Timer, TrainingEngine, compute_loss, evaluating
from tostlm.train.held_out import HeldOut


class Scores(NamedTuple):
    """What the predictions of some tokens add up to."""

    nats: float
    tokens: int
    text_bytes: int

    def numbers(self, name: str) -> dict[str, float]:
        """Return the mean loss in nats and the bits per byte, by names that `name` is put into."""
        bits = self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan
        return {f"loss{name}": self.nats / self.tokens, f"bits_per_byte{name}": bits}


def evaluate(
    engine: TrainingEngine, held_out: Sequence[HeldOut], batches: RankBatches, tokenizer: Tokenizer, timer: Timer
) -> dict[str, float]:
    """Return what `validate` finds; the same of the moving average of the weights, where there is one, behind ema/."""
    found = validate(engine, held_out, batches, tokenizer, timer)
    if engine.weight_average is None:
        return found
    with averaged_weights(engine):
        averaged = validate(engine, held_out, batches, tokenizer, timer)
    return {**found, **{f"{EMA}/{name}": value for name, value in averaged.items()}}


@torch.no_grad()
def validate(
    engine: TrainingEngine, held_out: Sequence[HeldOut], batches: RankBatches, tokenizer: Tokenizer, timer: Timer
) -> dict[str, float]:
    """Score the held-out sequences and return the numbers by name. Every rank must call this.

    `loss`, in nats, `perplexity` and `bits_per_byte` are of the run's own sequences, `loss_at_N` and
    `bits_per_byte_at_N` of the same tokens at each N of `train.eval_contexts`. Where several folders are blended, there
    is one of each folder too, with /FOLDER behind. Every token counts once, however they are distributed over ranks.
    """
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(engine.device)
    sums = []
    with evaluating(engine):
        for part in held_out:
            with closing(batches.held_out(part)) as read:
                sums.append(torch.stack([_score(engine, batch, token_bytes, timer) for batch in read]).sum(0))
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
