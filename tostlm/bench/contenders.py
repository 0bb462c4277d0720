"""Models whose training steps are timed: tostlm's own and those of transformers, behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tostlm.config import RunConfig, load_config, matmul_dtype
from tostlm.errors import UserError, error_summary
from tostlm.eval.models import POSITIONS
from tostlm.files import distinct_names
from tostlm.formats import is_hugging_face
from tostlm.model import LM, ModelConfig, create_lm

PREFIX = "transformers:"  # of a config whose shape transformers' GPT-2 gets


class Contender(NamedTuple):
    """A kind of model, which can be made for any context."""

    dtype: torch.dtype  # of products; weights are fp32
    vocab_size: int
    create: Callable[[int, bool], nn.Module]  # for a context of so many tokens, with random weights or any
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of inputs and targets [B, T]

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which a pass computes."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


def open_contenders(models: Sequence[str], compiled: bool) -> dict[str, Contender]:
    """Return contenders by the names to report.

    Args:
        models: files of run configs or names of shipped ones; `transformers:CONFIG` for transformers' GPT-2 of that
            shape; folders of Hugging Face's, of which the config alone is read. Models of transformers compute in the
            dtype of the first config.
        compiled: whether torch compiles them: tostlm's block by block, as training does.

    Raises:
        UserError: a config is wrong, transformers has no such model, or none is of a config.
    """
    runs = {
        model: load_config(Path(model.removeprefix(PREFIX))) for model in models if not is_hugging_face(Path(model))
    }
    if not runs:
        raise UserError(f"{models[0]} is a folder of Hugging Face's; name a config first, whose dtype is used")
    dtype = matmul_dtype(next(iter(runs.values())))
    names = distinct_names([Path(_shown(model)) for model in models])
    return {name: _open(model, runs.get(model), dtype, compiled) for name, model in zip(names, models, strict=True)}


def _shown(model: str) -> str:
    config = model.removeprefix(PREFIX)
    return config if config == model else f"transformers-{Path(config).name}"


def _open(model: str, run: RunConfig | None, dtype: torch.dtype, compiled: bool) -> Contender:
    if run is None:
        return _hugging_face(_read_hugging_face(Path(model)), dtype, compiled)
    if model.startswith(PREFIX):
        return _hugging_face(_gpt2_config(model, run.model), dtype, compiled)
    return _own(run, compiled)


def _own(run: RunConfig, compiled: bool) -> Contender:
    def create(context: int, with_weights: bool) -> nn.Module:
        shape = replace(run.model, positions=None if run.model.positions is None else context)
        lm = create_lm(shape, run.seed) if with_weights else LM(shape)
        if compiled:
            for block in lm.blocks:
                block.compile()
        return lm

    def loss(lm: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = lm(inputs, targets=targets)[0]
        return found

    return Contender(matmul_dtype(run), run.model.vocab_size, create, loss)


def _hugging_face(config: Any, dtype: torch.dtype, compiled: bool) -> Contender:
    from transformers import AutoModelForCausalLM

    def create(context: int, with_weights: bool) -> nn.Module:
        for name in POSITIONS:
            if hasattr(config, name):
                setattr(config, name, context)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if compiled:
            model.compile()
        return model.train()

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = model(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        return found

    return Contender(dtype, config.vocab_size, create, loss)


def _gpt2_config(name: str, model: ModelConfig) -> Any:
    """Return the config of transformers' GPT-2 with a model's depth, width, heads and vocabulary, without dropout."""
    from transformers import GPT2Config

    if model.positions is None:
        raise UserError(f"{name}: transformers' GPT-2 has positions, and this config none; name a gpt2 config")
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": model.depth, "n_embd": model.width, "n_head": model.heads, "n_inner": model.mlp_channels}
    last = model.vocab_size - 1
    ids = {"bos_token_id": last, "eos_token_id": last, "loss_type": "ForCausalLM"}
    return GPT2Config(vocab_size=model.vocab_size, n_positions=model.positions, **sizes, **without, **ids)


def _read_hugging_face(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is of no model that transformers has: {error_summary(error)}") from None
