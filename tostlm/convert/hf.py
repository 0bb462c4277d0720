"""A checkpoint as a Hugging Face folder, published only when it computes the same logits."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tostlm.checkpoint import Checkpoint
from tostlm.convert.configuration_tost import TostConfig
from tostlm.convert.gpt2 import is_gpt2, to_gpt2
from tostlm.convert.modeling_tost import TostForCausalLM
from tostlm.convert.tokenizer import save_tokenizer
from tostlm.data.tokenizers import METASPACE
from tostlm.errors import UserError
from tostlm.files import atomic_folder, require_writable
from tostlm.model import LM, MIXERS

INTERNAL_IMPORT = re.compile(r"^from (tostlm[\w.]*) import", re.MULTILINE)
PROBE_TEXT = (
    "A state is 2C + H numbers.\n\n\tTokens: 1776, \u201cna\u00efve\u201d, \u2581, \u6f22\u5b57 \U0001f642  end"
)
PROBE_TOKENS = 96
TOLERANCE = 1e-3  # of the logits' spread; folding LayerScale and another order of sums stay a hundred times below


def export_hf(checkpoint: Checkpoint, out: Path) -> None:
    """Write a folder that transformers alone can load: weights, configuration, tokenizer and, for ToST, modeling files.

    A GPT-2 model becomes transformers' own GPT2LMHeadModel. Before the folder appears at `out`, its logits (of a whole
    context and token by token) and its token ids are compared with the checkpoint's.

    Raises:
        UserError: `out` exists, or the written model does not compute the same.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another folder")
    require_writable(out.parent)
    transformers.utils.logging.disable_progress_bar()
    with atomic_folder(out) as folder:
        _write(checkpoint, folder)
        _check(checkpoint, folder)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    lm, eos_id = checkpoint.lm, checkpoint.tokenizer.eos_id
    if is_gpt2(lm):
        model: transformers.PreTrainedModel = to_gpt2(lm, eos_id)
    else:
        config = TostConfig(
            **dataclasses.asdict(lm.config),
            bos_token_id=eos_id,
            eos_token_id=eos_id,
            dtype=lm.embed.weight.dtype,
            architectures=["TostForCausalLM"],
            auto_map={
                "AutoConfig": "configuration_tost.TostConfig",
                "AutoModelForCausalLM": "modeling_tost.TostForCausalLM",
            },
        )
        with torch.device("meta"):
            model = TostForCausalLM(config)
        model.lm.load_state_dict(lm.state_dict(), assign=True)
        for name, source in _standalone_sources(lm).items():
            (folder / f"{name}.py").write_text(source)
    model.config.tokenizer_sha256 = checkpoint.tokenizer.sha256
    model.save_pretrained(folder)
    save_tokenizer(checkpoint.tokenizer, lm.config.positions, folder)


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


@torch.no_grad()
def _check(checkpoint: Checkpoint, folder: Path) -> None:
    lm = copy.deepcopy(checkpoint.lm).float()  # in bf16 rounding would hide a difference
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, lm.config.positions or PROBE_TOKENS)
    tokens = torch.randint(checkpoint.tokenizer.vocab_size, (2, length), generator=generator)
    expected = lm(tokens)[0]
    _compare(folder, "logits", exported(tokens).logits, expected)
    _compare(folder, "logits of single steps", _stepwise(exported, tokens), expected)
    ours, theirs = checkpoint.tokenizer, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    pieces = [piece for piece, size in zip(ours.pieces, ours.token_bytes, strict=True) if size]
    texts = [PROBE_TEXT, *(piece.replace(METASPACE, " ") for piece in pieces)]
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        if ids != ours.encode(text):
            raise UserError(
                f"the exported tokenizer gives other ids for {text!r} than the checkpoint's; nothing was published: "
                "only BPE tokenizers without symbols of their own can be exported"
            )


def _stepwise(model: Any, tokens: Tensor) -> Tensor:
    past, logits = None, []
    for token in torch.split(tokens, 1, dim=1):
        output = model(token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _compare(folder: Path, what: str, found: Tensor, expected: Tensor) -> None:
    spread, error = float(expected.std()), float((found - expected).abs().max())
    if not error <= TOLERANCE * spread:
        raise UserError(
            f"the {what} of the model written to {folder} differ from the checkpoint's by {error:.1e} (their standard "
            f"deviation is {spread:.1e}, {TOLERANCE} of it is allowed); nothing was published"
        )


def sample(folder: Path, prompt: str, tokens: int) -> str:
    """Return the prompt and at most `tokens` sampled tokens after it, from an exported folder by transformers alone."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.8)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
