"""What a run is evaluated on while it trains: held-out sequences, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from tostlm.config import BatchPlan, RunConfig
from tostlm.data import VALIDATION, Loader, NumpyBatch, Targets, TokenSet, choose_targets
from tostlm.errors import UserError
from tostlm.files import distinct_names
from tostlm.model import IGNORE


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
