"""Reading and writing with a model from a state on, which can be stored and continued.

Shapes: B sequences, T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tostlm.errors import UserError, error_summary
from tostlm.eval.sampling import Sampling, next_tokens
from tostlm.eval.token_scores import PASS_TOKENS
from tostlm.files import write_atomically
from tostlm.model import LM, LMState, state_tensors
from tostlm.shapes import Int

MODEL, TOKENS, DTYPE = "model", "tokens", "dtype"  # what a stored state says beside its tensors
PENDING, SEEN, DOCUMENT_START = "pending", "seen", "document_start"


@torch.no_grad()
def read_context(
    lm: LM, tokens: Int[Tensor, "B T"], state: LMState | None = None, pass_tokens: int = PASS_TOKENS
) -> LMState | None:
    """Return the state after tokens [B, T], read from `state` on in pieces of `pass_tokens` over all sequences.

    Without tokens it is `state`, and None is the start of a context.

    Raises:
        ValueError: the context becomes longer than the model's positions.
    """
    for piece in tokens.split(max(1, pass_tokens // len(tokens)), 1):
        if piece.shape[1]:
            _, state = lm.hidden(piece, state)
    return state


class Writer:
    """Reads sequences of one length with a model, and writes on, token by token.

    With mixers of constant state each token costs the same after any context.

    Args:
        vocab_size: only ids below it are written; the embedding may have more rows than the tokenizer has tokens.
        seeds: one for each sequence.
    """

    def __init__(self, lm: LM, vocab_size: int, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._lm, self._vocab_size, self._sampling = lm, vocab_size, sampling
        self._device = lm.embed.weight.device
        self._generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        self.state: LMState | None = None  # of what the model has read
        # What it has yet to read: at least the last token, whose logits choose the next one.
        self.pending = torch.zeros(len(seeds), 0, dtype=torch.int64, device=self._device)
        self._seen = torch.zeros(len(seeds), vocab_size, dtype=torch.bool, device=self._device)

    @property
    def _dtype(self) -> str:
        return str(self._lm.embed.weight.dtype).removeprefix("torch.")

    @property
    def tokens(self) -> int:
        """The number of tokens in each sequence so far."""
        return (self.state.tokens if self.state else 0) + self.pending.shape[1]

    def read(self, tokens: Int[Tensor, "B T"]) -> None:
        """Read tokens [B, T].

        Raises:
            ValueError: the context becomes longer than the model's positions.
        """
        tokens = tokens.to(self._device)
        self._seen.scatter_(1, tokens, True)
        self.pending = torch.cat([self.pending, tokens], 1)
        self._take(self.pending.shape[1] - 1)

    def _take(self, count: int) -> None:
        """Let the model read all but the last of what is pending, in pieces."""
        self.state = read_context(self._lm, self.pending[:, :count], self.state)
        self.pending = self.pending[:, count:]

    @torch.no_grad()
    def write(self) -> Int[Tensor, " B"]:
        """Return the next token of each sequence, [B]; something must have been read before.

        Raises:
            ValueError: as `read` does.
            UserError: the model's logits are not finite.
        """
        x, self.state = self._lm.hidden(self.pending, self.state)
        logits = self._lm.logits(x[:, -1:])[:, 0, : self._vocab_size]
        if not torch.isfinite(logits).all():
            raise UserError("the model's logits are not finite; it has diverged, or needs a wider --dtype")
        found = next_tokens(logits, self._seen, self._sampling, self._generators)
        self.pending = found[:, None]
        self._seen.scatter_(1, self.pending, True)
        return found

    def save(self, path: Path, model: str) -> None:
        """Store what has been read and written in a file; `model` identifies the model that can continue it.

        Raises:
            OSError: it cannot be written.
        """
        state = self.state
        tensors = {} if state is None else dict(state_tensors(state))
        if state is not None and state.document_start is not None:
            tensors[DOCUMENT_START] = state.document_start
        tensors |= {PENDING: self.pending, SEEN: self._seen}
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {MODEL: model, TOKENS: str(state.tokens if state else 0), DTYPE: self._dtype}
        write_atomically(path, safetensors.torch.save(contiguous, about))

    def restore(self, path: Path, model: str) -> None:
        """Continue from what `save` stored, each sequence of this writer from the one that was stored.

        Raises:
            UserError: there is none, it is damaged, of another model, or of several sequences.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            pending, seen, start = tensors.pop(PENDING), tensors.pop(SEEN), tensors.pop(DOCUMENT_START, None)
            if about[DTYPE] != self._dtype:
                raise UserError(f"the state in {path} is of weights in {about[DTYPE]}; choose that --dtype again")
            if about[MODEL] != model:
                raise UserError(f"the state in {path} is of another model; read its text again with this one")
            if len(pending) != 1 or seen.shape != (1, self._vocab_size):
                raise UserError(f"the state in {path} is of {len(pending)} sequences, and one is continued")
            rows = [0] * len(self._generators)
            if tensors:
                moved = {name: tensor.to(self._device) for name, tensor in tensors.items()}
                layers = self._lm.state_from_tensors(moved).layers
                start = None if start is None else start.to(self._device)
                whole = LMState(int(about[TOKENS]), layers, start)
                self.state = whole.select(torch.tensor(rows, device=self._device))
            self.pending, self._seen = pending[rows].to(self._device), seen[rows].to(self._device)
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} holds no state that this model could continue ({error_summary(error)})") from None
