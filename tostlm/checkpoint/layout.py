"""Checkpoints as everything but training reads them: tensors without pickles, the config and the tokenizer.

A run's folder holds

    config.yaml
    metrics.jsonl, tensorboard/
    checkpoints/latest            the newest checkpoint's name, for people and other tools
    checkpoints/step-00000100/
        state/00000.safetensors   of each parameter NAME, whole and in fp32: NAME/weight, NAME/exp_avg, NAME/exp_avg_sq
        weights.safetensors       the model in the dtype it trained in, where train.save_weights is on
        carry.safetensors         what a run that carries its state remembers of its documents
        config.yaml               the run's config
        tokenizer.model | .json
        progress.json             where the run was
        COMPLETE                  bytes and SHA-256 of every other file, written last

Nothing in it depends on the number of ranks or on the ZeRO stage that wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tostlm.config import RunConfig, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError, error_summary
from tostlm.model import LM

STATE, WEIGHTS, CARRY = "state", "weights.safetensors", "carry.safetensors"
CONFIG, PROGRESS, COMPLETE = "config.yaml", "progress.json", "COMPLETE"
STEP = re.compile(r"^step-(\d{8,})$")


class TrainState(NamedTuple):
    """Where a run was. The training loop says the first six; saving adds the rest."""

    step: int = 0
    data_step: int = 0  # steps of the loader that were read; above `step` once some were skipped
    validation_loss: float | None = None  # of the last evaluation, in nats
    skipped_steps: int = 0
    rollbacks: int = 0
    good_losses: tuple[float, ...] = ()  # of the last steps, which spikes are told by
    optimizer_steps: int = 0  # Adam's count, which its bias correction reads
    loss_scale: dict[str, float] | None = None  # where fp16 adapts it
    world_size: int = 1  # this and the next for information alone
    zero_stage: int = 0
    data_sha256: str = ""  # of what the prepared folders hold

    def advance(self, skipped: bool) -> TrainState:
        """Return the state after one more step, whose update was `skipped` or not."""
        return self._replace(
            step=self.step + 1, data_step=self.data_step + 1, skipped_steps=self.skipped_steps + skipped
        )

    def evaluated(self, validation_loss: float) -> TrainState:
        """Return the state after an evaluation with this mean loss in nats."""
        return self._replace(validation_loss=validation_loss)


class Checkpoint(NamedTuple):
    """A trained model and all that is needed to use it."""

    path: Path
    lm: LM
    config: RunConfig
    tokenizer: Tokenizer
    progress: TrainState


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """The folders of a run that are named as checkpoints are, whole or not, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, for where its content may be going away."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's finished checkpoints, oldest first."""
    return [folder for folder in step_folders(run_dir) if (folder / COMPLETE).is_file()]


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


def read_train_state(checkpoint: Path) -> TrainState:
    """How far a checkpoint's run was.

    Raises:
        UserError: the file is damaged.
    """
    try:
        progress = TrainState(**json.loads((checkpoint / PROGRESS).read_text()))
        return progress._replace(good_losses=tuple(progress.good_losses))  # JSON has lists alone
    except (OSError, ValueError, TypeError):
        raise UserError(f"checkpoint {checkpoint} has no readable {PROGRESS}; use an older one") from None


def read_state(checkpoint: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `keys`, as in NAME/weight, one at a time.

    Raises:
        UserError: a file is damaged, or a tensor is not there.
    """
    try:
        with ExitStack() as opened:
            files = [
                opened.enter_context(safetensors.safe_open(path, "pt"))
                for path in sorted((checkpoint / STATE).glob("*.safetensors"))
            ]
            holder = {key: file for file in files for key in file.keys()}  # noqa: SIM118  (it is no mapping)
            for key in keys:
                yield key, holder[key].get_tensor(key)
    except KeyError as error:
        raise UserError(f"checkpoint {checkpoint} holds no {error} in {STATE}/; use an older one") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint}: {STATE}/ cannot be read ({error_summary(error)})") from None


def read_carry(checkpoint: Path) -> dict[str, Tensor]:
    """What the run remembered of its documents; empty where it remembered nothing."""
    path = checkpoint / CARRY
    return safetensors.torch.load_file(path) if path.is_file() else {}


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a model for evaluation or conversion, from a checkpoint or a run's folder; nothing is unpickled.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = resolve(path)
    if not (checkpoint / CONFIG).is_file():
        raise UserError(f"checkpoint {checkpoint} has no {CONFIG}: it is damaged; use an older one")
    config, tokenizer = load_config(checkpoint / CONFIG), Tokenizer.from_folder(checkpoint)
    with torch.device("meta"):
        lm = LM(config.model)
    source = checkpoint / (WEIGHTS if (checkpoint / WEIGHTS).is_file() else STATE)
    try:
        weights = _masters(checkpoint, config, lm) if source.is_dir() else safetensors.torch.load_file(source)
        lm.load_state_dict(weights, assign=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: {source.name} does not fit its config ({error_summary(error)})"
        ) from None
    lm = lm.to(device).eval().requires_grad_(False)
    return Checkpoint(checkpoint, lm, config, tokenizer, read_train_state(checkpoint))


def _masters(checkpoint: Path, config: RunConfig, lm: LM) -> dict[str, Tensor]:
    """The master weights in the dtype that the run trains in."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
    state = read_state(checkpoint, [f"{name}/weight" for name in lm.state_dict()])
    return {key.removesuffix("/weight"): tensor.to(dtype, copy=True) for key, tensor in state}
