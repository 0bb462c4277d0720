"""Folders that DeepSpeed's `save_checkpoint` writes: `latest`, and a folder of pickles that it names.

Source: https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from tostlm.config import load_config, use_cpu_without_gpu
from tostlm.errors import UserError, error_summary
from tostlm.formats.naming import take_own_weights
from tostlm.formats.pickles import load_pickle
from tostlm.model import ModelConfig

LATEST, RUN_CONFIG = "latest", "config.yaml"
MODEL_STATES, OPTIMIZER_STATES = "*_model_states.pt", "*_optim_states.pt"
WHOLE_MODEL = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_00_model_states\.pt")  # no part of a model, nor an expert


def is_deepspeed(path: Path) -> bool:
    """Return whether a path is a folder of DeepSpeed's checkpoints."""
    return any(files_of(path))


def files_of(path: Path) -> list[Path]:
    """Return the pickles of the checkpoint that `latest` names; none in another kind of folder."""
    try:
        folder = path / (path / LATEST).read_text().strip() if (path / LATEST).is_file() else path
        patterns = (MODEL_STATES, OPTIMIZER_STATES) if folder.parent == path else ()  # nothing outside of it
        return sorted(file for pattern in patterns for file in folder.glob(pattern))
    except (OSError, ValueError):
        return []


def read_trained(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return tostlm's own model and its weights, from a checkpoint beside which the run's config.yaml lies.

    Raises:
        UserError: there is none, or the weights are not its model's; see `read_consolidated`.
    """
    if not (path / RUN_CONFIG).is_file():
        raise UserError(
            f"{path} is a checkpoint of DeepSpeed's without its model's shape; put the config.json of what was "
            "trained beside latest, or the config.yaml of a run"
        )
    config = load_config(path / RUN_CONFIG).model
    return config, take_own_weights(read_consolidated(path), config, str(path))


def read_consolidated(path: Path) -> dict[str, Tensor]:
    """Return a model's parameters in fp32 by the names that it had in DeepSpeed, from a checkpoint of any ZeRO stage.

    DeepSpeed puts them together, after every file was seen to hold tensors, plain values and DeepSpeed's records alone.
    At stage 0, and where they were frozen, they are those of the module, rounded as it had them.

    Raises:
        UserError: it holds anything else, is damaged, or of a model in parts.
    """
    files = files_of(path)
    models = [file for file in files if file.match(MODEL_STATES)]
    if parts := [file.name for file in models if not WHOLE_MODEL.fullmatch(file.name)]:
        raise UserError(
            f"{path} has parts of a model in {parts[0]} (tensor, pipeline or expert parallelism); merge them"
        )
    if (models[0].parent / "zero").is_dir():
        raise UserError(f"{path} names a universal checkpoint as its latest; name the one that it was made of there")
    use_cpu_without_gpu()  # before DeepSpeed is imported
    loaded = {file: _load(file) for file in files}
    module = _module(loaded[models[0]], models[0])
    if len(models) == len(files) == 1:
        if loaded[models[0]].get("param_shapes") is not None:  # which stage 0 has not
            raise UserError(f"{path} has no optim_states.pt, where the weights are that ZeRO trained; copy them too")
        return module
    if old := [file for file in files if not zipfile.is_zipfile(file)]:
        raise UserError(
            f"{old[0]} is in torch's format before 1.6, which DeepSpeed does not put together; load it and "
            "save it again with torch.save"
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # In a folder of their own, as DeepSpeed takes a name such as step[1] for a pattern, which other files may fit.
    with TemporaryDirectory() as checked:
        for file in files:
            Path(checked, file.name).symlink_to(file.resolve())
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                merged: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(*os.path.split(checked))
        except Exception as error:  # of incomplete checkpoints DeepSpeed raises any
            why = error_summary(error).replace(checked, str(models[0].parent))
            raise UserError(
                f"{path} cannot be put together: {why}; is a rank's file missing, or was it saved by another optimizer "
                "than ZeRO's?"
            ) from None
    if len(models) > 1:  # stage 3, whose module is in parts
        return merged
    return {name: tensor.float() for name, tensor in module.items()} | merged


def _module(saved: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    module = saved.get("module")
    if not isinstance(module, Mapping) or not all(isinstance(tensor, Tensor) for tensor in module.values()):
        raise UserError(f"{file} has no module with parameters; it is damaged, or not DeepSpeed's")
    return dict(module)


def _load(file: Path) -> Mapping[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    saved = load_pickle(
        file,
        "tensors, plain values and DeepSpeed's own records",
        "Save without a client_state of other objects",
        "it is damaged",
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address],
    )
    if not isinstance(saved, Mapping):
        raise UserError(f"{file} holds a {type(saved).__name__} and no records by name; it is not DeepSpeed's")
    return saved
