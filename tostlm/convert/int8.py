"""A Hugging Face folder with matrices in int8, of whose rows each has a scale, and what that costs in perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from tostlm.checkpoint import Checkpoint
from tostlm.convert.card import UNKNOWN
from tostlm.convert.hf import write_hf
from tostlm.convert.verify import Comparison
from tostlm.data import VALIDATION, TokenSet
from tostlm.data.loading.token_set import Windows
from tostlm.errors import UserError
from tostlm.eval.text import require_tokenizer

MEASURED_TOKENS = 1 << 14
WINDOW_TOKENS = 512  # at most
WEIGHTS = "model*.safetensors*"


class PerplexityCost(NamedTuple):
    """The perplexity of the same tokens before and after."""

    tokens: int
    data: Path
    before: float
    after: float

    def __str__(self) -> str:
        change = self.after / self.before - 1
        return (
            f"perplexity of {self.tokens:,} held-out tokens of {self.data}: {self.before:.4f} before, "
            f"{self.after:.4f} in int8 ({change:+.2%})"
        )


def write_int8(
    checkpoint: Checkpoint, folder: Path, *, data: Path | None = None, license: str = UNKNOWN
) -> list[Comparison | PerplexityCost]:
    """Write a Hugging Face folder with int8 weights, which transformers loads where torchao is installed.

    Args:
        data: a prepared folder, whose held-out tokens say what it costs; None is the first that the run trained on.

    Raises:
        UserError: torchao is missing, the data cannot be read or are of another tokenizer, or the weights, before they
            are rounded, do not compute the same.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise UserError("--to int8 takes `pip install 'tostlm[int8]'`") from None
    windows = _held_out(checkpoint, data)
    # torchao rounds nn.Linear, which transformers' GPT-2 has none of.
    found: list[Comparison | PerplexityCost] = [*write_hf(checkpoint, folder, license=license, own_class=True)]
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig())
    ).eval()
    exact_bytes = _weight_bytes(folder)
    for file in folder.glob(WEIGHTS):
        file.unlink()
    rounded.save_pretrained(folder)
    if _weight_bytes(folder) >= exact_bytes:
        raise UserError(f"torchao rounded no matrix of {checkpoint.path}; nothing was published")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    scored = windows.shape[0] * (windows.shape[1] - 1)
    before = _perplexity(lambda tokens: checkpoint.lm(tokens)[0], windows)
    after = _perplexity(lambda tokens: again(tokens).logits, windows)
    where = data or checkpoint.config.data.folders[0]
    return [*found, PerplexityCost(scored, where, before, after)]


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS))


def _held_out(checkpoint: Checkpoint, data: Path | None) -> Tensor:
    """Return held-out tokens [windows, T + 1]."""
    folder = data or checkpoint.config.data.folders[0]
    if data is None and not folder.is_dir():
        raise UserError(f"{folder}, which the model was trained on, is not here; name a prepared folder with --data")
    tokens = TokenSet(folder, VALIDATION)
    require_tokenizer(tokens, checkpoint.tokenizer, checkpoint.path)
    context = min(WINDOW_TOKENS, checkpoint.lm.config.positions or WINDOW_TOKENS)
    windows = Windows(tokens, context, within_documents=False)
    count = min(len(windows), max(1, MEASURED_TOKENS // context))
    return torch.from_numpy(np.stack([windows[n] for n in range(count)]))


@torch.no_grad()
def _perplexity(logits: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    losses = [F.cross_entropy(logits(row[None, :-1])[0].float(), row[1:]) for row in windows]
    return math.exp(float(torch.stack(losses).mean()))
