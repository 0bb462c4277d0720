"""Choosing the next token from a model's logits.

Shapes: B sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tostlm.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Each of the filters sees what those before it left, in this order.

    Raises:
        ValueError: a number is out of range.
    """

    # What has been read or written has its logit divided by it if positive, else multiplied (CTRL, arXiv 1909.05858).
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # the likeliest tokens, so many
    top_p: float | None = None  # the fewest likeliest tokens whose probabilities add up to it (arXiv 1904.09751)
    min_p: float | None = None  # tokens of at least this part of the likeliest one's probability (arXiv 2407.01082)

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 1e6), ("repetition_penalty", 1e-3, 1e3), ("min_p", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} {value} must be from {low:g} to {high:g}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")


def next_tokens(
    logits: Float[Tensor, "B V"],
    seen: Bool[Tensor, "B V"],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Int[Tensor, " B"]:
    """Return a token for each sequence: [B].

    Args:
        logits: [B, V] of the last token.
        seen: [B, V], which tokens the sequence has had.
        generators: one for each sequence, so that what is drawn does not depend on the others.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)).double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.where(logits >= logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # of likelier tokens
        logits = logits.masked_fill((before >= sampling.top_p).gather(-1, order.argsort(-1)), -torch.inf)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        logits = logits.where(probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    rows = zip(logits.softmax(-1), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
