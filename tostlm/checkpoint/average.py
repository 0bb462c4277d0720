"""Averages of weights, as checkpoints to evaluate, generate from and convert: of checkpoints, or what one has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tostlm.checkpoint.integrity import CONFIG, TRAIN_STATE, find_damage, written_files
from tostlm.checkpoint.layout import (
    RECURRENT_STATE,
    checkpoints,
    has_optimizer,
    read_kind,
    read_train_state,
    read_weights,
    resolve,
    weights_dtype,
)
from tostlm.checkpoint.weights_only import require_free, write_weights
from tostlm.config import RunConfig, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.files import atomic_folder
from tostlm.optim import EMA

SOURCES = "averaged.json"  # the paths of the checkpoints that it is made of


def newest_checkpoints(path: Path, count: int) -> list[Path]:
    """Return a checkpoint itself, or of a run's folder the newest `count`, oldest first.

    Raises:
        UserError: there are not as many.
    """
    if (path / TRAIN_STATE).is_file():
        return [path]
    found = checkpoints(path)[-count:]
    if len(found) < count:
        resolve(path)  # says so where there is none at all
        raise UserError(f"{path} has {len(found)} checkpoints, not {count}; train.keep_last_checkpoints keeps more")
    return found


def average(sources: Sequence[Path], out: Path, shares: Sequence[float] | None = None) -> None:
    """Write the mean of checkpoints' weights, in the dtype that the run trains in, to a folder.

    It has no optimizer's state: no run resumes from it, and one that begins from it has a new optimizer.

    Args:
        shares: of each source; None gives all the same. A share may be below 0 or above 1.

    Raises:
        UserError: one is damaged, they are of different models or tokenizers, fewer than two, or `out` exists; the
            shares are not as many, or do not add up to 1.
    """
    require_free(out)
    for path in sources:
        if [other.resolve() for other in sources].count(path.resolve()) > 1:
            raise UserError(f"{path} is named twice; its weights would count double")
    if len(sources) < 2:
        raise UserError(f"a mean takes two checkpoints or more, and {', '.join(map(str, sources))} is one")
    shares = [1 / len(sources)] * len(sources) if shares is None else shares
    if len(shares) != len(sources) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(
            f"--shares {','.join(f'{share:g}' for share in shares)} must be a number for each of {len(sources)} "
            "checkpoints that add up to 1"
        )
    config = _require_alike(sources)
    mean: dict[str, Tensor] = {}
    for share, source in zip(shares, sources, strict=True):
        for name, weight in _weights(source, config):
            mean.setdefault(name, torch.zeros_like(weight, dtype=torch.float64)).add_(weight, alpha=share)
    newest = max(sources, key=lambda source: read_train_state(source).step)
    _write(out, mean, newest, sources)


def extract_ema(checkpoint: Path, out: Path) -> None:
    """Write the moving average of the weights that a checkpoint has, in the dtype that the run trains in, to a folder.

    As with `average`, it has no optimizer's state.

    Raises:
        UserError: the checkpoint is damaged or has none, or `out` exists.
    """
    require_free(out)
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"checkpoint {checkpoint} is damaged: {damage}; use an older one")
    if read_train_state(checkpoint).ema_updates is None:
        raise UserError(f"{checkpoint} has no moving average of the weights; train with train.ema_decay")
    _write(out, dict(read_kind(checkpoint, load_config(checkpoint / CONFIG), EMA)), checkpoint, [checkpoint])


def _write(out: Path, weights: Mapping[str, Tensor], newest: Path, sources: Sequence[Path]) -> None:
    """Write a checkpoint of weights alone, with the progress and the tokenizer of `newest`."""
    dtype, config = weights_dtype(load_config(newest / CONFIG)), (newest / CONFIG).read_bytes()
    state = read_train_state(newest)._replace(validation_loss=None, ema_updates=None)
    made_of = json.dumps([str(source.resolve()) for source in sources], indent=1).encode()
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    if not all(bool(weight.isfinite().all()) for weight in rounded.values()):
        raise UserError(f"the mean of {', '.join(map(str, sources))} is not finite; leave out what has diverged")
    with atomic_folder(out) as folder:
        write_weights(folder, rounded, config, Tokenizer.from_folder(newest), state, {SOURCES: made_of})


def _require_alike(sources: Sequence[Path]) -> RunConfig:
    """Return the config of checkpoints that are whole and of one model, precision and tokenizer."""
    for source in sources:
        if (damage := find_damage(source, [n for n in written_files(source) if n != RECURRENT_STATE])) is not None:
            raise UserError(f"checkpoint {source} is damaged: {damage}; leave it out")
    first = sources[0]
    config, tokenizer = load_config(first / CONFIG), Tokenizer.from_folder(first)
    for source in sources:
        other = load_config(source / CONFIG)
        if other.model != config.model:
            raise UserError(f"{first} and {source} are of different models; their weights have no mean")
        if other.precision != config.precision:
            raise UserError(f"{first} is of precision {config.precision}, {source} of {other.precision}; take one")
        if Tokenizer.from_folder(source).sha256 != tokenizer.sha256:
            raise UserError(f"{first} and {source} were trained with different tokenizers; their weights have no mean")
    return config


def _weights(checkpoint: Path, config: RunConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's weights: in fp32 where it has its optimizer's, else as it has them."""
    if has_optimizer(checkpoint):
        yield from read_kind(checkpoint, config, "weight")
    else:
        yield from read_weights(checkpoint, config).items()
