"""The losses of single tokens, in memory that does not grow with the context but by the model's own state.

Shapes: B sequences, T tokens read, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model import LM
from tostlm.shapes import Float, Int

PASS_TOKENS = 8192  # tokens that one forward pass reads
LOGIT_ROWS = 1024  # tokens whose logits are held at a time


@torch.no_grad()
def token_losses(
    lm: LM, rows: Int[Tensor, "B read"], scored: int, pass_tokens: int = PASS_TOKENS
) -> Float[Tensor, "B S"]:
    """Return the loss in nats of each of the last `scored` tokens of rows [B, T + 1], in fp32: [B, scored].

    Every row is read from its first token on, in pieces of `pass_tokens` over all rows.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    first, start, state, losses = inputs.shape[1] - scored, 0, None, []
    for piece in inputs.split(max(1, pass_tokens // len(rows)), 1):
        x, state = lm.hidden(piece, state)
        begin, end = max(first, start), start + piece.shape[1]
        if begin < end:
            losses.append(_cross_entropies(lm, x[:, begin - start :], targets[:, begin:end]))
        start = end
    return torch.cat(losses, 1)


def _cross_entropies(lm: LM, x: Float[Tensor, "B S C"], targets: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    pieces = zip(x.flatten(0, 1).split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(lm.logits(part[None])[0].float(), wanted, reduction="none") for part, wanted in pieces]
    return torch.cat(losses).view_as(targets)
