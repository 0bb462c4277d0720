"""Text from a model, one token after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tostlm.model import LM


@torch.no_grad()
def generate(
    lm: LM, prompt: Sequence[int], vocab_size: int, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Iterator[int]:
    """Tokens below `vocab_size` after `prompt` (at least one token), without end; temperature 0 takes the likeliest.

    Each step reads one token and the state, so for ToST a step costs the same after any context.

    Raises:
        ValueError: the context outgrows the model's positions.
    """
    device = lm.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens, state = torch.tensor([prompt], device=device), None
    while True:
        logits, state = lm(tokens, state)
        last = logits[0, -1, :vocab_size].float()
        if temperature == 0:
            token = last.argmax()
        else:
            if top_k is not None:
                last = last.where(last >= last.topk(min(top_k, len(last))).values[-1], -torch.inf)
            token = torch.multinomial(
                torch.softmax((last - last.max()).double() / temperature, -1), 1, generator=generator
            )[0]
        yield int(token)
        tokens = token.view(1, 1)
