"""A model of another format as a checkpoint of weights alone: to evaluate, to train on, and to convert further."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from tostlm.checkpoint import Checkpoint, load_checkpoint
from tostlm.checkpoint.weights_only import write_weights
from tostlm.config import dump_config
from tostlm.convert.modeling_tost import TostForCausalLM
from tostlm.convert.release import release_logits
from tostlm.convert.verify import Comparison, compare, computed_in_fp32, random_documents, source_logits
from tostlm.errors import UserError
from tostlm.formats import is_hugging_face
from tostlm.formats.folders import read_model_config
from tostlm.formats.release import release_file


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
    return [compare("logits of whole documents", found, _foreign_logits(checkpoint, tokens), folder)]


@torch.no_grad()
def _foreign_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] that the program a model is from computes; no code of its folder is executed."""
    path = checkpoint.path
    if file := release_file(path):
        return release_logits(file, tokens)
    if not is_hugging_face(path):
        return source_logits(checkpoint, tokens)
    transformers.utils.logging.disable_progress_bar()
    kind = TostForCausalLM if read_model_config(path)["model_type"] == "tost" else transformers.GPT2LMHeadModel
    model, problems = kind.from_pretrained(path, dtype="auto", output_loading_info=True)
    if problems["missing_keys"] or problems["mismatched_keys"]:
        raise UserError(f"transformers does not find the model's own weights in {path}: {problems}")
    with computed_in_fp32(model, model.transformer.h if hasattr(model, "transformer") else model.lm.blocks):
        logits: Tensor = model.eval()(tokens).logits
    return logits
