"""What a model makes of single tokens, in memory that does not grow with the context but by the model's own state.

Shapes: B sequences, T tokens read, S of them scored, C channels, V rows of the vocabulary, N tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model import LM, LMState
from tostlm.shapes import Float, Int

PASS_TOKENS = 8192  # tokens that one forward pass reads
LOGIT_ROWS = 1024  # tokens whose logits are held at a time
TokenScore = Callable[[Tensor, Tensor], Tensor]  # of logits [N, V] in fp32 and the tokens that followed, [N]: [N, ...]
R = TypeVar("R")  # what a model remembers of the tokens it has read


def nats(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the loss of each token."""
    return F.cross_entropy(logits, targets, reduction="none")


def nats_and_hits(vocab_size: int) -> TokenScore:
    """Return a score of two: the loss of each token, and 1 where it is the likeliest of the ids below `vocab_size`.

    The embedding may have more rows than the tokenizer has tokens.
    """

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([nats(logits, targets), (logits[:, :vocab_size].argmax(-1) == targets).float()], -1)

    return score


@torch.no_grad()
def token_scores(
    lm: LM,
    rows: Int[Tensor, "B read"],
    scored: int,
    pass_tokens: int = PASS_TOKENS,
    score: TokenScore = nats,
    state: LMState | None = None,
) -> Tensor:
    """Return a score of each of the last `scored` tokens of rows [B, T + 1], by default its loss in nats: [B, S, ...].

    Every row is read from its first token on, in pieces of `pass_tokens` over all rows. `state` is the model's before
    them; None at the start of a context.
    """
    return scores_in_pieces(rows, scored, pass_tokens, lm.hidden, partial(_score_hidden, lm, score), state)


def scores_in_pieces(
    rows: Tensor,
    scored: int,
    pass_tokens: int,
    read: Callable[[Tensor, R | None], tuple[Tensor, R]],
    score: Callable[[Tensor, Tensor], Tensor],
    state: R | None = None,
) -> Tensor:
    """Return the scores of the last `scored` tokens of rows [B, T + 1], [B, S, ...].

    Args:
        pass_tokens: that are read at a time, over all rows.
        read: returns what a model makes of some tokens [B, n], [B, n, ...], and its state after them; None before any.
        score: returns the scores [B, m, ...] of m targets from what was made of the tokens before them.
        state: of the model before the rows.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    first, start = inputs.shape[1] - scored, 0
    scores: Tensor | None = None
    for piece in inputs.split(max(1, pass_tokens // len(rows)), 1):
        made, state = read(piece, state)
        begin, end = max(first, start), start + piece.shape[1]
        if begin < end:
            found = score(made[:, begin - start :], targets[:, begin:end])
            # At once for all: small tensors kept from each piece would divide the memory that the next ones need.
            scores = found.new_empty(len(rows), scored, *found.shape[2:]) if scores is None else scores
            scores[:, begin - first : end - first] = found
        start = end
    assert scores is not None
    return scores


def _score_hidden(lm: LM, score: TokenScore, x: Float[Tensor, "B S C"], targets: Int[Tensor, "B S"]) -> Tensor:
    pieces = zip(x.flatten(0, 1).split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
    scores = [score(lm.logits(part[None])[0].float(), wanted) for part, wanted in pieces]
    found: Tensor = torch.cat(scores).unflatten(0, targets.shape)
    return found
