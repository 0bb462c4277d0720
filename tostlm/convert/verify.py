"""Whether a converted model computes what its source does: both read the same documents, and their logits are compared.

Shapes: B documents, T tokens, V rows of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tostlm.checkpoint import Checkpoint
from tostlm.data import Tokenizer
from tostlm.data.tokenizers import METASPACE
from tostlm.errors import UserError

DOCUMENTS, TOKENS = 8, 48  # of random tokens, which show more than text does
STEPS = 8  # tokens at the end of the documents that are read one by one
TOLERANCE = 1e-3  # of the logits' spread; folding LayerScale and another order of sums stay a hundred times below
PROBE_TEXT = (
    "A state is 2C + H numbers.\n\n\tTokens: 1776, \u201cna\u00efve\u201d, \u2581, \u6f22\u5b57 \U0001f642  end"
)


class Comparison(NamedTuple):
    """What of a converted model was compared with its source's, and how far they are apart."""

    what: str
    difference: float  # the largest, in standard deviations of the source's

    def __str__(self) -> str:
        if not self.difference:
            return f"{self.what}: the same"
        return f"{self.what}: differ by {self.difference:.1e} standard deviations at most"


def random_documents(checkpoint: Checkpoint) -> Tensor:
    """Return tokens [B, T] of documents that a checkpoint's model can read."""
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, checkpoint.lm.config.positions or TOKENS)
    return torch.randint(checkpoint.tokenizer.vocab_size, (DOCUMENTS, length), generator=generator)


def compare(what: str, found: Tensor, expected: Tensor) -> Comparison:
    """Compare logits.

    Raises:
        UserError: they differ by more than rounding does.
    """
    error = float((found.float() - expected.float()).abs().max())
    spread = float(expected.float().std())
    if not math.isfinite(spread):
        raise UserError("the source's logits are not finite: its weights have diverged, or are damaged")
    if not error <= TOLERANCE * spread:
        raise UserError(
            f"the {what} of the converted model differ from the source's by {error:.1e} (their standard deviation is "
            f"{spread:.1e}, {TOLERANCE} of it is allowed); nothing was published"
        )
    return Comparison(what, error / spread if error else 0.0)


@torch.no_grad()
def compare_causal_lm(exported: Any, tokens: Tensor, expected: Tensor) -> list[Comparison]:
    """Compare a model of transformers' with logits [B, T, V]: whole documents, continued by steps, and padded.

    Raises:
        UserError: see `compare`.
    """
    found = [compare("logits of whole documents", exported(tokens).logits, expected)]
    T = tokens.shape[1]
    read = max(0, T - STEPS)
    past = exported(tokens[:, :read], use_cache=True).past_key_values if read else None
    steps = []
    for token in torch.split(tokens[:, read:], 1, dim=1):
        output = exported(token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    found.append(compare("logits of single steps", torch.cat(steps, dim=1), expected[:, read:]))
    lengths = torch.linspace(T, 1, len(tokens)).long()
    for side in ("left", "right"):
        mask = torch.arange(T) < lengths[:, None]  # [B, T]
        own = mask
        if side == "left":
            mask = mask.flip(1)
        batch = torch.zeros_like(tokens)
        batch[mask] = tokens[own]
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits = exported(batch, attention_mask=mask.long(), position_ids=places).logits
        found.append(compare(f"logits of documents padded on the {side}", logits[mask], expected[own]))
    return found


def compare_tokenizers(own: Tokenizer, exported: Any) -> Comparison:
    """Check that a tokenizer of transformers' gives the ids of a checkpoint's, for a text and for every token's.

    Raises:
        UserError: it does not.
    """
    pieces = [piece for piece, size in zip(own.pieces, own.token_bytes, strict=True) if size]
    texts = [PROBE_TEXT, *(piece.replace(METASPACE, " ") for piece in pieces)]
    for text, ids in zip(texts, exported(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        if ids != own.encode(text):
            raise UserError(
                f"the exported tokenizer gives other ids for {text!r} than the checkpoint's; nothing was published: "
                "only BPE tokenizers without normalization and symbols of their own can be exported"
            )
    return Comparison(f"token ids of {len(texts):,} texts", 0.0)


@contextmanager
def computed_in_fp32(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let a model of any dtype compute in fp32, where rounding hides no difference, a block of it in fp32 at a time."""
    blocks = list(blocks)[1:]  # the first one's values are read beside it
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    restore = [_widen(p for p in model.parameters() if id(p) not in inside)]
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda block, _: restore.append(_widen(block.parameters()))))
        handles.append(block.register_forward_hook(lambda *_: restore.pop()()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while restore:
            restore.pop()()


def _widen(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Convert parameters to fp32, and return what gives them their own numbers back."""
    narrow = [(p, p.data) for p in parameters if p.dtype != torch.float32]
    for parameter, data in narrow:
        parameter.data = data.float()

    def restore() -> None:
        for parameter, data in narrow:
            parameter.data = data

    return restore


@torch.no_grad()
def source_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] of a checkpoint's model, computed in fp32."""
    with computed_in_fp32(checkpoint.lm, checkpoint.lm.blocks):
        logits: Tensor = checkpoint.lm(tokens)[0]
    return logits
