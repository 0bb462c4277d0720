"""Generating tokens with a model, one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tostlm.checkpoint import load_checkpoint
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.model import LM


def generate_text(path: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int) -> str:
    """Return a prompt and its continuation by a checkpoint's model, up to the end of the document or `tokens` tokens.

    `path` is a checkpoint, or a run's folder for its newest one; `generate` describes the other arguments.

    Raises:
        UserError: there is no checkpoint, the prompt is not valid text, or prompt and continuation exceed the model's
            learned positions.
    """
    checkpoint = load_checkpoint(path, best_device())
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not valid text in this terminal's encoding; use UTF-8") from None
    tokenizer, positions = checkpoint.tokenizer, checkpoint.config.model.positions
    start = [tokenizer.eos_id, *tokenizer.encode(prompt)]  # a document follows the end of another, as in training
    if positions is not None and len(start) + tokens - 1 > positions:
        fits = positions - len(start) + 1
        remedy = f"ask for at most {fits} --tokens" if fits > 0 else "shorten the prompt"
        lengths = f"a prompt of {len(start)} tokens and {tokens} more"
        raise UserError(f"{lengths} are longer than the model's {positions} positions; {remedy}")
    generated = generate(checkpoint.lm, start, tokenizer.vocab_size, temperature=temperature, top_k=top_k, seed=seed)
    text = itertools.takewhile(lambda token: token != tokenizer.eos_id, itertools.islice(generated, tokens))
    return tokenizer.decode([*start, *text])  # in one call: some tokenizers write a space before a document's start


@torch.no_grad()
def generate(
    lm: LM, prompt: Sequence[int], vocab_size: int, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Iterator[int]:
    """Yield sampled tokens after a prompt, without end.

    Each step reads one token and the state, so with mixers of constant state it costs the same after any context.

    Args:
        prompt: token ids, at least one.
        vocab_size: only ids below it are sampled; the embedding may have more rows than the tokenizer has tokens.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the likeliest `top_k` tokens; None among all.

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
            probabilities = torch.softmax((last - last.max()).double() / temperature, -1)
            token = torch.multinomial(probabilities, 1, generator=generator)[0]
        yield int(token)
        tokens = token.view(1, 1)
