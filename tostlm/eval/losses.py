"""The losses of single tokens, in memory that does not grow with the context but by the model's own state.

Shapes: B sequences, T tokens read, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model import LM
from tostlm.shapes import Float, Int

PASS_TOKENS = 8192  # tokens that one forward pass reads
LOGIT_ROWS = 1024  # tokens whose logits are held at a time
S = TypeVar("S")  # what a model remembers of the tokens it has read


@torch.no_grad()
def token_losses(
    lm: LM, rows: Int[Tensor, "B read"], scored: int, pass_tokens: int = PASS_TOKENS
) -> Float[Tensor, "B S"]:
    """Return the loss in nats of each of the last `scored` tokens of rows [B, T + 1], in fp32: [B, scored].

    Every row is read from its first token on, in pieces of `pass_tokens` over all rows.
    """
    return losses_in_pieces(rows, scored, pass_tokens, lm.hidden, partial(_cross_entropies, lm))


def losses_in_pieces(
    rows: Tensor,
    scored: int,
    pass_tokens: int,
    read: Callable[[Tensor, S | None], tuple[Tensor, S]],
    score: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the losses of the last `scored` tokens of rows [B, T + 1], [B, scored].

    Args:
        pass_tokens: that are read at a time, over all rows.
        read: returns what a model makes of some tokens [B, n], [B, n, ...], and its state after them; None before any.
        score: returns the losses [B, m] of m targets from what was made of the tokens before them.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    first, start, losses = inputs.shape[1] - scored, 0, list[Tensor]()
    state: S | None = None
    for piece in inputs.split(max(1, pass_tokens // len(rows)), 1):
        made, state = read(piece, state)
        begin, end = max(first, start), start + piece.shape[1]
        if begin < end:
            losses.append(score(made[:, begin - start :], targets[:, begin:end]))
        start = end
    return torch.cat(losses, 1)


def _cross_entropies(lm: LM, x: Float[Tensor, "B S C"], targets: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    pieces = zip(x.flatten(0, 1).split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(lm.logits(part[None])[0].float(), wanted, reduction="none") for part, wanted in pieces]
    return torch.cat(losses).view_as(targets)
