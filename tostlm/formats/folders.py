"""Folders of Hugging Face: config.json and weights, GPT-2's and those that tostlm exports. No code in them is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tostlm.errors import UserError, error_summary
from tostlm.files import read_json_object
from tostlm.formats.deepspeed import LATEST, files_of, is_deepspeed, read_consolidated
from tostlm.formats.gpt2 import read_gpt2
from tostlm.formats.naming import require_depth, take_own_weights
from tostlm.formats.pickles import load_pickle
from tostlm.model import ModelConfig
from tostlm.model.mixers.base import options_from_dict

HF_CONFIG = "config.json"  # what makes a folder Hugging Face's
TRAINING = "training"  # in an export: the run's config and its tokenizer, as the checkpoint has them
EXPORTED = "lm."  # what an exported model has before the names of its parameters
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there, or its index, counts
INDEX = ".index.json"
OWN_FILES = ("config", "tokenizer", "vocab", "merges")
OWN_SUFFIXES = (".safetensors", ".bin", ".pt", ".model", ".py")


def is_hugging_face(path: Path) -> bool:
    """Return whether a path is a folder of a model, as Hugging Face's programs write one."""
    return (path / HF_CONFIG).is_file()


def folder_content(path: Path) -> str:
    """Return what changes with the files that a folder's numbers depend on; reports may lie beside them."""
    beside = [file for file in path.iterdir() if file.name.startswith(OWN_FILES) or file.suffix in OWN_SUFFIXES]
    own = sorted([*beside, *files_of(path)])
    return str([(file.name, file.stat().st_size, file.stat().st_mtime) for file in own])


def read_model_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder, whose `model_type` is "gpt2" or "tost".

    Raises:
        UserError: it is damaged, its weights are rounded, or it is of a model that tostlm has not.
    """
    values = read_json_object((path / HF_CONFIG).read_bytes())
    if values is None:
        raise UserError(f"{path / HF_CONFIG} is no JSON object; the folder is damaged")
    if (kind := values.get("model_type")) not in ("gpt2", "tost"):
        raise UserError(f"{path} holds a model of type {kind}; tostlm reads gpt2 and its own exports, of type tost")
    if "quantization_config" in values:
        raise UserError(f"{path} holds rounded weights, for inference alone; name the checkpoint that it was made of")
    return values


def read_folder(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model of a folder, and its weights, which are read from its files when they are used.

    Raises:
        UserError: it is damaged, or of a model that tostlm has not.
    """
    values = read_model_config(path)
    kind, tensors = values["model_type"], read_tensors(path)
    try:
        return read_gpt2(values, tensors, str(path)) if kind == "gpt2" else _read_export(values, tensors, str(path))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path / HF_CONFIG} describes no model ({error_summary(error)}); it is damaged") from None


def _read_export(
    values: Mapping[str, Any], theirs: Mapping[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor]]:
    shape = {field.name: values[field.name] for field in fields(ModelConfig) if field.name in values}
    config = ModelConfig(**shape | {"layers": tuple(map(options_from_dict, values["layers"]))})
    require_depth(config, theirs)
    return config, take_own_weights(theirs, config, where, EXPORTED)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder, which stay in their files until they are used, but for those of DeepSpeed's."""
    for name in WEIGHTS:
        if (path / name).is_file():
            return _read_file(path / name)
        if (path / f"{name}{INDEX}").is_file():
            return _read_shards(path, name)
    if is_deepspeed(path):
        return read_consolidated(path)
    named = f", and its {LATEST} names no checkpoint of DeepSpeed's in it" if (path / LATEST).is_file() else ""
    raise UserError(f"{path} has none of {', '.join(WEIGHTS)}{named}; download its weights too")


def _read_shards(path: Path, name: str) -> dict[str, Tensor]:
    index = read_json_object((path / f"{name}{INDEX}").read_bytes())
    places = (index or {}).get("weight_map")
    files = {str(file) for file in places.values()} if isinstance(places, dict) else set()
    if not isinstance(places, dict) or not files or any(Path(file).name != file for file in files):
        raise UserError(f"{path / name}{INDEX} names no weight_map of files beside it; it is damaged")
    tensors: dict[str, Tensor] = {}
    for file in sorted(files):
        tensors |= _read_file(path / file)
    if places.keys() != tensors.keys():
        raise UserError(f"{path}: its index and its files do not have the same tensors; download them again")
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # of damaged files the reader raises any
            raise UserError(f"{path} cannot be read: {error_summary(error)}; download it again") from None
    loaded = load_pickle(path, "tensors", "", "download it again")
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(f"{path} holds other things than tensors by name; it is no file of weights")
    return dict(loaded)
