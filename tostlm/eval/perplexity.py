"""Perplexity at growing context lengths, on the same target tokens at every one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tostlm.checkpoint import Checkpoint
from tostlm.data import Targets, TokenSet
from tostlm.errors import UserError
from tostlm.model import perplexity

PASS_TOKENS = 8192  # tokens that one forward pass reads


class Score(NamedTuple):
    """How well a model predicts the targets from `context` tokens before them."""

    context: int
    nats: float  # mean over the targets
    bits_per_byte: float
    perplexity: float


def score_contexts(
    checkpoint: Checkpoint, tokens: TokenSet, targets: Targets, contexts: Sequence[int]
) -> Iterator[Score]:
    """Yield the model's score on the same targets at each context, shortest first, up to the model's positions.

    Raises:
        UserError: the tokens were made with another tokenizer than the model's.
    """
    if tokens.manifest.tokenizer_sha256 != checkpoint.tokenizer.sha256:
        raise UserError(
            f"{tokens.folder} was prepared with another tokenizer than the one {checkpoint.path} was trained with; "
            f"prepare the text again with {checkpoint.path / checkpoint.tokenizer.file_name}"
        )
    limit = checkpoint.config.model.positions
    scored = np.concatenate([tokens.read(end - targets.span, end) for end in targets.ends])
    text_bytes = int(checkpoint.tokenizer.token_bytes[scored].sum())
    count = len(scored)
    for context in sorted(contexts):
        if limit is not None and context > limit:
            return
        nats = _total_nats(checkpoint, tokens, targets, context)
        yield Score(context, nats / count, nats / math.log(2) / text_bytes, perplexity(nats / count))


@torch.no_grad()
def _total_nats(checkpoint: Checkpoint, tokens: TokenSet, targets: Targets, context: int) -> float:
    total = 0.0
    device = checkpoint.lm.embed.weight.device
    batch = max(1, PASS_TOKENS // context)
    for first in range(0, len(targets.ends), batch):
        rows = [tokens.read(end - context - 1, end) for end in targets.ends[first : first + batch]]
        window = torch.from_numpy(np.stack(rows)).to(device)  # [batch, context + 1]
        first_target = context + 1 - targets.span
        state = None
        for piece in torch.split(window[:, : first_target - 1], PASS_TOKENS, dim=1):
            _, state = checkpoint.lm.hidden(piece, state)
        scored = window[:, first_target:]
        loss, _ = checkpoint.lm(window[:, first_target - 1 : -1], state, scored)
        total += float(loss) * scored.numel()
    return total
