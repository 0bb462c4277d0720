"""Dividing the passages of an evaluation over ranks, whose sums become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.eval.perplexity import Totals
from tostlm.eval.protocols import Passage
from tostlm.launch import RankInfo

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # ranks may have very different documents


def join(ranks: RankInfo) -> None:
    """Join the process group of the ranks, if there are several; what they exchange lies on the host."""
    if ranks.world_size > 1:
        if torch.cuda.is_available():  # a launcher may make only its own GPU visible to each rank
            torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT)


def broadcast(ranks: RankInfo, found: list[Totals] | None) -> list[Totals] | None:
    """Return on every rank what rank 0 has found."""
    if ranks.world_size == 1:
        return found
    message = [found]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def together(ranks: RankInfo, function: Callable[[], T]) -> T:
    """Return what a function returns on this rank, once it has returned on all. Every rank must call this.

    Raises:
        UserError: on rank 0, what any rank has raised. The others raise SystemExit with `EXIT_USER_ERROR`.
    """
    if ranks.world_size == 1:
        return function()
    results: list[T] = []
    error: str | None = None
    try:
        results.append(function())
    except UserError as raised:
        error = str(raised)
    errors: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(errors, error)
    if any(errors):
        if ranks.rank:
            raise SystemExit(EXIT_USER_ERROR)
        raise UserError(next(filter(None, errors)))
    return results[0]


def add_up(
    ranks: RankInfo, passages: Sequence[Passage], measure: Callable[[Sequence[Passage]], Sequence[Totals]]
) -> list[Totals]:
    """Return the sums over passages, of which each rank measures its share. Every rank must call this.

    Raises:
        UserError: as `together` does.
    """
    found = together(ranks, lambda: measure(passages[ranks.rank :: ranks.world_size]))
    if ranks.world_size == 1:
        return list(found)
    sums = torch.from_numpy(np.stack([np.stack(totals) for totals in found]))  # [contexts, sums, documents]
    dist.all_reduce(sums)
    return [Totals(*totals) for totals in sums.numpy()]
