"""Text that a checkpoint's model writes after prompts, from a stored state on, as it is written or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.eval.sampling import Sampling
from tostlm.eval.writer import Writer
from tostlm.model import LM

KEPT = 8  # tokens before those that are decoded, so that characters and spaces come out as in the whole


class TextStream:
    """Makes text of tokens as they come, of which a prefix is never taken back.

    Args:
        before: tokens before the first one.
        stop: strings at which the text ends, without them.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._kept, self._tokens = list(before)[-KEPT:], list[int]()
        self._held = ""  # text that a stop string may begin in
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that is certain once a token has come; the end-of-document token ends the text."""
        if token == self._tokenizer.eos_id:
            self.ended = True
            return self.flush()
        self._tokens.append(token)
        before, whole = self._decode(self._kept), self._decode([*self._kept, *self._tokens])
        if whole.endswith("\ufffd"):  # a part of a character
            return ""
        self._held += whole[len(before) :]
        self._kept, self._tokens = [*self._kept, *self._tokens][-KEPT:], []
        return self._release()

    def flush(self) -> str:
        """Return what was held back, at the end."""
        whole, before = self._decode([*self._kept, *self._tokens]), self._decode(self._kept)
        held, self._held, self._tokens = self._held + whole[len(before) :], "", []
        return held

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([self._tokenizer.eos_id, *tokens])

    def _release(self) -> str:
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.ended, text, self._held = True, self._held[: min(found)], ""
            return text
        longest = max((n for text in self._stop for n in range(len(text)) if self._held.endswith(text[:n])), default=0)
        cut = len(self._held) - longest
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def write_text(
    writer: Writer, tokenizer: Tokenizer, before: Sequence[int], tokens: int, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the text that a writer of one sequence writes: up to `tokens` tokens, a stop string or the document's end.

    `before` are the last tokens that it has read.
    """
    stream = TextStream(tokenizer, before, stop)
    for _ in range(tokens):
        if text := stream.add(int(writer.write()[0])):
            yield text
        if stream.ended:
            return
    if text := stream.flush():
        yield text


def write_batch(
    lm: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop: Sequence[str] = (),
) -> list[str]:
    """Return the texts that follow prompts of one length, written together; see `write_text`."""
    writer = Writer(lm, tokenizer.vocab_size, sampling, seeds)
    writer.read(torch.tensor(prompts))
    streams = [TextStream(tokenizer, prompt, stop) for prompt in prompts]
    texts = [""] * len(prompts)
    for _ in range(tokens):
        for row, token in enumerate(writer.write().tolist()):
            if not streams[row].ended:
                texts[row] += streams[row].add(token)
        if all(stream.ended for stream in streams):
            break
    return [text + ("" if stream.ended else stream.flush()) for text, stream in zip(texts, streams, strict=True)]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt that begins a document: after the end of another, as in training.

    Raises:
        UserError: it is not valid text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not valid text in this terminal's encoding; use UTF-8") from None
    return [tokenizer.eos_id, *tokenizer.encode(prompt)]


def require_room(positions: int | None, read: int, tokens: int) -> None:
    """Check that a model's learned positions, if it has any, hold what is read and written.

    Raises:
        UserError: they do not.
    """
    if positions is not None and read + tokens - 1 > positions:
        fits = positions - read + 1
        remedy = f"ask for at most {fits} --tokens" if fits > 0 else "shorten the prompt"
        lengths = f"a prompt of {read} tokens and {tokens} more"
        raise UserError(f"{lengths} are longer than the model's {positions} positions; {remedy}")
