"""Checkpoints of weights alone: averages, and models of other formats. Runs begin from them with a new optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tostlm.checkpoint.integrity import CONFIG, TRAIN_STATE
from tostlm.checkpoint.layout import WEIGHTS, TrainState
from tostlm.checkpoint.state_files import Content, write_checksums, write_file
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.files import require_writable


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: bytes,
    tokenizer: Tokenizer,
    train_state: TrainState,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint of weights alone to an empty folder.

    Args:
        config: the content of its config.yaml.
        others: contents of further files by name.

    Raises:
        OSError: it cannot be written.
    """
    files: dict[str, Content] = {
        WEIGHTS: weights,
        CONFIG: config,
        tokenizer.file_name: tokenizer.content,
        TRAIN_STATE: train_state.to_json().encode(),
        **(others or {}),
    }
    write_checksums(folder, {name: write_file(folder / name, content) for name, content in files.items()})


def require_free(out: Path) -> None:
    """Check that a checkpoint can be written to a folder.

    Raises:
        UserError: something is there, it is among the checkpoints of a run, or its parent cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists; remove it or choose another folder")
    if is_among_checkpoints(out):
        raise UserError(f"{out} is among the checkpoints of a run, which would take it for its own; write it elsewhere")
    require_writable(out.parent)


def is_among_checkpoints(path: Path) -> bool:
    """Return whether a path is, or would be, in the folder of a run's checkpoints, by whatever links it is named."""
    beside = path.resolve().parent
    return beside.name == "checkpoints" and (beside.parent / CONFIG).exists()
