"""A checkpoint as a Hugging Face folder that transformers alone can load."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

from tostlm.checkpoint import CONFIG, Checkpoint
from tostlm.checkpoint.integrity import TRAIN_STATE
from tostlm.config import dump_config
from tostlm.convert.card import UNKNOWN, write_card
from tostlm.convert.configuration_tost import TostConfig
from tostlm.convert.modeling_tost import TostForCausalLM
from tostlm.convert.shards import SHARD_BYTES, write_shards
from tostlm.convert.tokenizer import save_tokenizer
from tostlm.convert.verify import (
    Comparison,
    compare_causal_lm,
    compare_tokenizers,
    computed_in_fp32,
    random_documents,
    source_logits,
)
from tostlm.errors import UserError
from tostlm.formats import TRAINING
from tostlm.formats.folders import EXPORTED
from tostlm.formats.gpt2 import gpt2_config, gpt2_tensors, is_gpt2
from tostlm.model import LM, MIXERS

INTERNAL_IMPORT = re.compile(r"^from (tostlm[\w.]*) import", re.MULTILINE)


def write_hf(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    own_class: bool = False,
    license: str = UNKNOWN,
) -> list[Comparison]:
    """Write weights, configurations, tokenizer, model card and, for `TostForCausalLM`, modeling files to a folder.

    A GPT-2 model becomes transformers' own GPT2LMHeadModel, whose weights have LayerScale folded in, unless
    `own_class`. What was written is loaded by transformers and compared with the checkpoint.

    Raises:
        UserError: it does not compute the same.
    """
    transformers.utils.logging.disable_progress_bar()
    lm = checkpoint.lm
    as_gpt2 = is_gpt2(lm.config) and not own_class
    dtype = torch.float32 if as_gpt2 and lm.config.layer_scale is not None else lm.embed.weight.dtype
    config = _gpt2_config(checkpoint) if as_gpt2 else _tost_config(checkpoint)
    config.dtype, config.tokenizer_sha256 = dtype, checkpoint.tokenizer.sha256
    config.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_shards(folder, _gpt2_weights(lm) if as_gpt2 else _tost_weights(lm), shard_bytes)
    if not as_gpt2:
        for name, source in _standalone_sources(lm).items():
            (folder / f"{name}.py").write_text(source)
    save_tokenizer(checkpoint.tokenizer, lm.config.positions, folder)
    _write_training(checkpoint, folder / TRAINING)
    write_card(checkpoint, folder, not as_gpt2, license)
    return _compare(checkpoint, folder)


def _gpt2_config(checkpoint: Checkpoint) -> transformers.PretrainedConfig:
    fields = gpt2_config(checkpoint.lm.config, checkpoint.tokenizer.eos_id)
    return transformers.GPT2Config(**fields, architectures=["GPT2LMHeadModel"])


def _tost_config(checkpoint: Checkpoint) -> TostConfig:
    eos_id = checkpoint.tokenizer.eos_id
    return TostConfig(
        **dataclasses.asdict(checkpoint.lm.config),
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        architectures=["TostForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_tost.TostConfig",
            "AutoModelForCausalLM": "modeling_tost.TostForCausalLM",
        },
    )


def _gpt2_weights(lm: LM) -> Iterator[tuple[str, Tensor]]:
    weights = dict(lm.named_parameters())
    for name, make in gpt2_tensors(lm.config).items():
        yield name, make(weights).cpu()


def _tost_weights(lm: LM) -> Iterator[tuple[str, Tensor]]:
    for name, weight in lm.named_parameters():
        yield EXPORTED + name, weight.cpu()


def _write_training(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what transformers has no place for, so that the folder can become the same checkpoint again."""
    folder.mkdir()
    (folder / CONFIG).write_text(dump_config(checkpoint.config))
    (folder / TRAIN_STATE).write_text(checkpoint.train_state.to_json())
    (folder / checkpoint.tokenizer.file_name).write_bytes(checkpoint.tokenizer.content)


def _standalone_sources(lm: LM) -> dict[str, str]:
    """Return the source of every module the model needs, by its name in the exported folder, which has no packages.

    They are the project's own files, with their imports of each other made relative. The configuration's file imports
    the modules of the model's mixers, which registers them. It is that file because transformers keeps one model class
    for each configuration class, and tells the files of two exports apart by what they import: exports with different
    mixers can be loaded by one process.
    """
    # Of the whole plan, which may be longer than the model is deep: the exported config has all of it.
    planned = (MIXERS[options.mixer] for options in lm.config.layers)
    mixers = {mixer.__module__: mixer.__name__ for mixer in planned}
    sources: dict[str, str] = {}
    pending = [TostForCausalLM.__module__, *mixers]
    while pending:
        module = pending.pop()
        if _flat_name(module) not in sources:
            source = inspect.getsource(importlib.import_module(module))
            pending += INTERNAL_IMPORT.findall(source)
            sources[_flat_name(module)] = INTERNAL_IMPORT.sub(lambda m: f"from .{_flat_name(m[1])} import", source)
    register = [f"from .{_flat_name(module)} import {mixer} as {mixer}\n" for module, mixer in sorted(mixers.items())]
    sources[_flat_name(TostConfig.__module__)] += "\n" + "".join(register)
    return sources


def _flat_name(module: str) -> str:
    return module.removeprefix("tostlm.convert.").replace(".", "_")


def _compare(checkpoint: Checkpoint, folder: Path) -> list[Comparison]:
    tokens = random_documents(checkpoint)
    exported, problems = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    if any(problems.values()):
        raise UserError(f"transformers does not find the model's own weights in {folder}: {problems}")
    blocks = exported.transformer.h if hasattr(exported, "transformer") else exported.lm.blocks
    expected = source_logits(checkpoint, tokens)
    with computed_in_fp32(exported, blocks):
        found = compare_causal_lm(exported, tokens, expected)
    fast = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [*found, compare_tokenizers(checkpoint.tokenizer, fast)]


def sample(folder: Path, prompt: str, tokens: int) -> str:
    """Return the prompt and at most `tokens` sampled tokens after it, from an exported folder by transformers alone."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.8)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
