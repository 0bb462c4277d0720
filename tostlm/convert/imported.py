"""A model of another format as a checkpoint of weights alone: to evaluate, to train on, and to convert further."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tostlm.checkpoint import Checkpoint, load_checkpoint
from tostlm.checkpoint.weights_only import write_weights
from tostlm.config import dump_config
from tostlm.convert.configuration_tost import TostConfig
from tostlm.convert.modeling_tost import TostForCausalLM
from tostlm.convert.release import release_logits
from tostlm.convert.verify import Comparison, compare, computed_in_fp32, random_documents, source_logits
from tostlm.errors import UserError
from tostlm.formats import is_hugging_face
from tostlm.formats.folders import read_model_config, read_tensors
from tostlm.formats.gpt2 import COMPUTED
from tostlm.formats.release import release_file
from tostlm.model import ModelConfig

# Of a config.json of GPT-2, what its shape and its formulas follow from.
SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
GPT2_FIELDS = (*SHAPE, "activation_function", "tie_word_embeddings", *COMPUTED)


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> list[Comparison]:
    """Write a model that `load_checkpoint` has read as a checkpoint of weights alone to a folder.

    Its logits are compared with those that the other program's model computes.

    Raises:
        UserError: they differ.
    """
    weights = {name: parameter.cpu() for name, parameter in checkpoint.lm.named_parameters()}
    config = dump_config(checkpoint.config).encode()
    write_weights(folder, weights, config, checkpoint.tokenizer, checkpoint.train_state)
    tokens = random_documents(checkpoint)
    found = source_logits(load_checkpoint(folder), tokens)
    return [compare("logits of whole documents", found, _foreign_logits(checkpoint, tokens))]


@torch.no_grad()
def _foreign_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] that the program a model is from computes; no code of its folder is executed."""
    path = checkpoint.path
    if file := release_file(path):
        return release_logits(file, tokens)
    if not is_hugging_face(path):
        return source_logits(checkpoint, tokens)
    fields, tensors = read_model_config(path), read_tensors(path)
    # Of the config what says the shape alone: other keys choose code and files to load.
    with torch.device("meta"):
        model: Any = _tost(fields) if fields["model_type"] == "tost" else _gpt2(fields)
    if fields["model_type"] == "tost":
        body, blocks = model, model.lm.blocks
    else:
        body, blocks = model.transformer, model.transformer.h
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    missing = body.load_state_dict(tensors, strict=False, assign=True).missing_keys
    if missing:
        raise UserError(f"{path} has no {', '.join(missing[:5])}, which transformers looks for")
    if body is not model:
        tied = fields.get("tie_word_embeddings", True)
        model.lm_head.weight = body.wte.weight if tied else nn.Parameter(tensors["lm_head.weight"])
    with computed_in_fp32(model, blocks):
        logits: Tensor = model.eval()(tokens).logits
    return logits


def _gpt2(fields: Mapping[str, Any]) -> transformers.GPT2LMHeadModel:
    own = {key: value for key, value in fields.items() if key in GPT2_FIELDS}
    config = transformers.GPT2Config(**own, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config)


def _tost(shape: Mapping[str, Any]) -> TostForCausalLM:
    named = [field.name for field in dataclasses.fields(ModelConfig) if field.name in shape]
    return TostForCausalLM(TostConfig(**{name: shape[name] for name in named}))
