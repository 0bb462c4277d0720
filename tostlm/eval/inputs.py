"""What an evaluation reads: models, held-out text, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tostlm.data import VALIDATION, TokenSet
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.eval.models import ScoredModel, TostModel, open_model
from tostlm.eval.token_scores import PASS_TOKENS


class EvalSettings(NamedTuple):
    """How models are scored."""

    contexts: Sequence[int]  # in tokens
    protocol: str = "same-targets"  # one of PROTOCOLS
    windows: int | None = None  # scored at each context, or documents of a stream; None for enough, or for all
    device: torch.device | None = None  # None is `best_device`
    trust_code: bool = False  # run the code that a Hugging Face folder brings
    dtype: torch.dtype | None = None  # of the weights; None is the checkpoint's
    pass_tokens: int = PASS_TOKENS  # that one forward pass reads
    clamp: bool = False  # checkpoints' models read beyond their learned positions, where they use the last one


def open_inputs(
    paths: Sequence[Path], data: Sequence[Path], settings: EvalSettings
) -> tuple[list[ScoredModel], list[TokenSet]]:
    """Return models and the held-out sets that they are to read.

    Args:
        paths: checkpoints, folders of runs for their newest ones, or Hugging Face folders.
        data: prepared folders; () is that of the first checkpoint's run, of a blend the first one.

    Raises:
        UserError: one cannot be read, no data is named, or a model has fewer positions than the shortest context.
    """
    device, shortest = settings.device or best_device(), min(settings.contexts)
    models = [open_model(path, device, settings.dtype, settings.trust_code, settings.clamp) for path in paths]
    own = [model.data for model in models if isinstance(model, TostModel)]
    if not data and not own:
        raise UserError("no checkpoint says what text to score; name a prepared folder with --data")
    try:
        sets = [TokenSet(folder, VALIDATION) for folder in data or own[:1]]
    except UserError as error:
        raise UserError(str(error) if data else f"{error}; or name the text to read with --data") from None
    for model in models:
        if model.positions is not None and model.positions < shortest:
            least = f"the shortest of --contexts, {shortest}"
            raise UserError(f"{model.path} has {model.positions} positions, fewer than {least}")
    return models, sets
