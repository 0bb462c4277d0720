"""Generating tokens with a model, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tostlm.model import LM


@torch.no_grad()
def generate(
    lm: LM, prompt: Sequence[int], vocab_size: int, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Iterator[int]:
    """Yield sampled tokens after a prompt, without end.

    Each step reads one token and the state, so with mixers of constant state it costs the same after any context.

    Args:
        lm: the model.
        prompt: token ids, at least one.
        vocab_size: only ids below it are sampled; the embedding may have more rows than the tokenizer has tokens.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the likeliest `top_k` tokens; None among all.
        seed: of the random generator.

    Raises:
        ValueError: the context becomes longer than the model's positions.
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
