"""Checkpoints as everything but training reads them: weights without pickles, the config and the tokenizer.

A run's folder holds

    config.yaml
    metrics.jsonl, tensorboard/
    checkpoints/step-00000100/
        weights.safetensors   the model, in the dtype it trained in
        config.yaml           the run's config
        tokenizer.model | .json
        progress.json         what a resumed run must match
        engine/               DeepSpeed's shards, for resuming alone
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from tostlm.config import RunConfig, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError, reason_of
from tostlm.model import LM

WEIGHTS, CONFIG, PROGRESS, ENGINE = (
    "weights.safetensors",
    "config.yaml",
    "progress.json",
    "engine",
)
STEP = re.compile(r"^step-(\d{8,})$")


class Progress(NamedTuple):
    """Where a run was, and what a resumed one must share beside its config."""

    step: int
    world_size: int
    data_sha256: str  # of what the prepared folders hold


class Checkpoint(NamedTuple):
    """A trained model and all that is needed to use it."""

    path: Path
    lm: LM
    config: RunConfig
    tokenizer: Tokenizer
    progress: Progress


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's finished checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step-*") if STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def resolve(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run's folder.

    Raises:
        UserError: there is none.
    """
    if (path / PROGRESS).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path} is neither a checkpoint nor the folder of a run that saved one")
    return found[-1]


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint, wherever it is now; of a copied checkpoint, itself."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def read_progress(checkpoint: Path) -> Progress:
    """How far a checkpoint's run was.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return Progress(**json.loads((checkpoint / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"checkpoint {checkpoint} has no readable {PROGRESS}; use an older one") from None


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a model for evaluation or conversion, from a checkpoint or a run's folder; nothing is unpickled.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = resolve(path)
    for name in (CONFIG, WEIGHTS):
        if not (checkpoint / name).is_file():
            raise UserError(f"checkpoint {checkpoint} has no {name}: it is damaged; use an older one")
    config, tokenizer = load_config(checkpoint / CONFIG), Tokenizer.of_folder(checkpoint)
    with torch.device("meta"):
        lm = LM(config.model)
    try:
        weights = safetensors.torch.load_file(checkpoint / WEIGHTS)
        lm.load_state_dict(weights, assign=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint}: {WEIGHTS} does not fit its config ({reason_of(error)})") from None
    lm = lm.to(device).eval().requires_grad_(False)
    return Checkpoint(checkpoint, lm, config, tokenizer, read_progress(checkpoint))
