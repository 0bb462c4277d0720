"""The files of a checkpoint, and reading them: tensors without pickles, the config and the tokenizer.

A run's folder holds

    config.yaml
    metrics.jsonl, tensorboard/
    checkpoints/latest                  the name of the newest checkpoint, for people and other tools
    checkpoints/step-00000100/
        state/00000.safetensors         of each parameter NAME, in full and in fp32: NAME/weight, and NAME/exp_avg and
                                        NAME/exp_avg_sq (AdamW) or NAME/momentum (Muon), and NAME/ema where
                                        train.ema_decay is set; NAME/weight alone before the first update
        weights.safetensors             the model in the dtype it trains in, where train.save_weights is on
        recurrent_state.safetensors     the recurrent state of each sequence, where data.stateful is on
        config.yaml                     the config of the run
        tokenizer.model | .json
        train_state.json                the progress of the run, a `TrainState`
        COMPLETE                        bytes and SHA-256 of every other file, written last

Nothing in it depends on the number of ranks or on the ZeRO stage that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
import pydantic_core
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tostlm.checkpoint.integrity import COMPLETE, CONFIG, TRAIN_STATE, find_damage, written_files
from tostlm.config import RunConfig, load_config, training_config
from tostlm.data import Tokenizer, read_manifest
from tostlm.errors import UserError, error_summary
from tostlm.files import sha256_of
from tostlm.formats import content_of, is_foreign, read_foreign
from tostlm.formats.naming import take_own_weights
from tostlm.model import LM, ModelConfig, weight_shapes

STATE, WEIGHTS, RECURRENT_STATE = "state", "weights.safetensors", "recurrent_state.safetensors"
Count = Annotated[int, pydantic.Field(strict=True, ge=0)]
STEP = re.compile(r"^step-(\d{8,})$")
WEIGHTS_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # a run's precision with weights in less than fp32


class TrainState(NamedTuple):
    """The progress of a run: training sets the first six fields, saving the others."""

    step: Count = 0
    data_step: Count = 0  # steps whose data were read; above `step` once a rollback skipped data
    validation_loss: float | None = None  # of the last evaluation, in nats
    skipped_steps: Count = 0
    rollbacks: Count = 0
    good_losses: tuple[float, ...] = ()  # of the last good steps, with which loss spikes are detected
    optimizer_steps: Count = 0  # the updates that Adam's bias correction counts
    loss_scale: dict[str, int | float] | None = None  # state of fp16's dynamic loss scale
    world_size: int = 1  # like zero_stage, for information only
    zero_stage: int = 0
    data_sha256: str = ""  # of the content of the prepared folders
    ema_updates: Count | None = None  # of the moving average of the weights that state/ has; None where it has none
    branched_from: str = ""  # the checkpoint of another run that this run began from, if any
    imported_from: str = ""  # the model of another format that the weights are of, if any

    def to_json(self) -> str:
        """Return the state as a line of JSON."""
        return f"{json.dumps(self._asdict())}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainState:
        """Return the state that `to_json` made a line of; raise ValueError if the text is none."""
        fields = pydantic_core.from_json(text)
        if not isinstance(fields, dict) or "step" not in fields:
            raise ValueError(f"{fields!r:.40} has no step")
        state: TrainState = pydantic.TypeAdapter(cls).validate_python(fields)
        return state

    def advance(self, skipped: bool) -> TrainState:
        """Return the state after one more step, whose update was `skipped` or not."""
        return self._replace(
            step=self.step + 1, data_step=self.data_step + 1, skipped_steps=self.skipped_steps + skipped
        )


class Checkpoint(NamedTuple):
    """A trained model and everything needed to use it."""

    path: Path
    lm: LM
    config: RunConfig
    tokenizer: Tokenizer
    train_state: TrainState

    @property
    def content(self) -> str:
        """What tells its weights from others': a hash, or of a Hugging Face folder names, sizes and times of files."""
        complete = self.path / COMPLETE
        return sha256_of(complete) if complete.is_file() else content_of(self.path)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """Return the folders of a run that are named as checkpoints, complete or not, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name, which stays known while its files are being deleted."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [folder for folder in step_folders(run_dir) if (folder / COMPLETE).is_file()]


def resolve(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint if it is the folder of a run.

    Raises:
        UserError: there is none.
    """
    if (path / TRAIN_STATE).is_file():
        return path
    if is_foreign(path):
        raise UserError(f"{path} is a model of another format; make a checkpoint of it: `tostlm convert --to tostlm`")
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path} is neither a checkpoint nor the folder of a run that saved one")
    return found[-1]


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint is in; of one elsewhere its own folder, of a file the file's."""
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def read_train_state(checkpoint: Path) -> TrainState:
    """Return the progress of the run when the checkpoint was saved.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return TrainState.from_json((checkpoint / TRAIN_STATE).read_text())
    except (OSError, ValueError):
        raise UserError(f"checkpoint {checkpoint} has no readable {TRAIN_STATE}; use an older one") from None


def read_state(checkpoint: Path, elements: Mapping[str, range]) -> Iterator[tuple[str, Tensor]]:
    """Yield elements of the training state's tensors in fp32, reading no more than the rows that hold them.

    Args:
        elements: what to read of each flattened tensor NAME/KIND, such as "embed.weight/exp_avg". Tensors of which
            nothing is read must exist too.

    Raises:
        UserError: a file is damaged, or a tensor is missing.
    """
    try:
        with ExitStack() as opened:
            files = [
                opened.enter_context(safetensors.safe_open(path, "pt"))
                for path in (checkpoint / name for name in written_files(checkpoint) if name.startswith(f"{STATE}/"))
            ]
            file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118  (it is no mapping)
            for key, wanted in elements.items():
                yield key, _read_elements(file_of[key].get_slice(key), wanted)
    except KeyError as error:
        raise UserError(f"checkpoint {checkpoint} holds no {error} in {STATE}/; use an older one") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint}: {STATE}/ cannot be read ({error_summary(error)})") from None


def _read_elements(stored: Any, wanted: range) -> Tensor:
    """Read elements of a flattened tensor by its rows; `stored` is safetensors' untyped `PySafeSlice`."""
    shape = stored.get_shape()
    row = max(1, math.prod(shape[1:]))  # elements
    first, end = wanted.start // row, -(-wanted.stop // row)
    rows: Tensor = stored[first:end] if shape else stored[...]
    return rows.flatten()[wanted.start - first * row : wanted.stop - first * row]


def read_recurrent_state(checkpoint: Path) -> dict[str, Tensor]:
    """Read the recurrent state of the run's sequences; {} if the run keeps none."""
    saved = RECURRENT_STATE in written_files(checkpoint)
    return safetensors.torch.load_file(checkpoint / RECURRENT_STATE) if saved else {}


def load_checkpoint(path: Path, device: torch.device | str = "cpu", tokenizer: Path | None = None) -> Checkpoint:
    """Load a checkpoint, the newest one of a run's folder, or a model that `is_foreign`, for evaluation or conversion.

    Nothing that a file holds is executed. On the CPU weights stay in their files until they are used, where they are
    there in the dtype that the model has.

    Args:
        tokenizer: of a foreign model whose folder has none.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    if is_foreign(path) and not (path / TRAIN_STATE).is_file():
        return _load_foreign(path, device, tokenizer)
    if tokenizer is not None:
        raise UserError(f"{path} has a tokenizer of its own; leave --tokenizer out")
    checkpoint = resolve(path)
    written = written_files(checkpoint)
    has_weights = WEIGHTS in written and (checkpoint / WEIGHTS).is_file()
    unused = (RECURRENT_STATE, STATE if has_weights else WEIGHTS)
    damage = find_damage(checkpoint, [name for name in written if name.partition("/")[0] not in unused])
    if damage is not None:
        raise UserError(f"checkpoint {checkpoint} is damaged: {damage}; use an older one")
    config = load_config(checkpoint / CONFIG)
    weights = read_weights(checkpoint, config) if has_weights else _read_masters(checkpoint, config)
    lm = _model_of(config.model, weights, device)
    return Checkpoint(checkpoint, lm, config, Tokenizer.from_folder(checkpoint), read_train_state(checkpoint))


def has_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint has an optimizer's state, or weights alone."""
    return any(name.startswith(f"{STATE}/") for name in written_files(checkpoint))


def read_weights(checkpoint: Path, config: RunConfig) -> dict[str, Tensor]:
    """Return the weights that a checkpoint has beside its state, or alone; they stay in their file until they are used.

    Raises:
        UserError: they are not those of the config's model.
    """
    try:
        found = safetensors.torch.load_file(checkpoint / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint}: {WEIGHTS} cannot be read ({error_summary(error)})") from None
    return take_own_weights(found, config.model, f"checkpoint {checkpoint}: {WEIGHTS}")


def _load_foreign(path: Path, device: torch.device | str, tokenizer: Path | None) -> Checkpoint:
    foreign = read_foreign(path, tokenizer)
    model, weights, state = foreign.config, foreign.weights, TrainState()
    config = training_config(model, WEIGHTS_PRECISION.get(weights["embed.weight"].dtype, "fp32"))
    if foreign.training is not None:
        trained, progress = load_config(foreign.training / CONFIG), read_train_state(foreign.training)
        # GPT-2's class has no LayerScale and always biases; and no format has what training alone asks for.
        own = replace(trained.model, layer_scale=model.layer_scale)
        held = replace(own, bias=model.bias, output_init=model.output_init, z_loss=model.z_loss)
        added = weights.keys() - weight_shapes(own).keys()
        if asdict(held) == asdict(model) and not any(bool(weights[name].any()) for name in added):
            model, weights = own, {name: weight for name, weight in weights.items() if name not in added}
            config, state = trained.model_copy(update={"model": own}), progress
    lm = _model_of(model, weights, device)
    return Checkpoint(path, lm, config, foreign.tokenizer, state._replace(imported_from=str(path.absolute())))


def _model_of(config: ModelConfig, weights: Mapping[str, Tensor], device: torch.device | str) -> LM:
    with torch.device("meta"):
        lm = LM(config)
    lm.load_state_dict(weights, assign=True)
    return lm.to(device).eval().requires_grad_(False)


def read_kind(checkpoint: Path, config: RunConfig, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint's state has of a kind, such as "weight" or "exp_avg", by parameter, in fp32.

    Raises:
        UserError: see `read_state`.
    """
    shapes = weight_shapes(config.model)
    for key, flat in read_state(checkpoint, {f"{name}/{kind}": range(s.numel()) for name, s in shapes.items()}):
        name = key.removesuffix(f"/{kind}")
        yield name, flat.view(shapes[name])


def _read_masters(checkpoint: Path, config: RunConfig) -> dict[str, Tensor]:
    """Read the master weights, rounded to the dtype that the run trains in."""
    dtype = weights_dtype(config)
    return {name: weight.to(dtype, copy=True) for name, weight in read_kind(checkpoint, config, "weight")}


def weights_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype that a run's weights are trained and saved in."""
    return next((dtype for dtype, name in WEIGHTS_PRECISION.items() if name == config.precision), torch.float32)


def data_sha256(config: RunConfig) -> str:
    """Return a hash of what the run's prepared folders hold."""
    contents = [read_manifest(folder).content_sha256 for folder in config.data.folders]
    return hashlib.sha256("".join(contents).encode()).hexdigest()
