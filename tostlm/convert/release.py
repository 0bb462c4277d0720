"""A checkpoint as the ToST release's ckpt.pt, and the release's model written out, for comparison.

Shapes: B documents, T tokens, C channels = H heads x D.
Source: https://github.com/RobinWu218/ToST, tost_lang/model_TSSA.py and sample.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.checkpoint import Checkpoint
from tostlm.convert.verify import Comparison, compare, random_documents, source_logits
from tostlm.errors import UserError
from tostlm.formats.pickles import save_pickle
from tostlm.formats.release import RELEASE_FILE, can_be_release, load_release, release_arguments, release_state
from tostlm.tssa import Inputs, tssa_reference


def write_release(checkpoint: Checkpoint, folder: Path) -> list[Comparison]:
    """Write a ckpt.pt that the release's sample.py and evaluations load, and the tokenizer, to an empty folder.

    The optimizer's state is left out: training goes on with a new one.

    Raises:
        UserError: the release's classes cannot hold the model, or what was written does not compute the same.
    """
    config, state = checkpoint.lm.config, checkpoint.train_state
    if not can_be_release(config):
        raise UserError(
            f"{checkpoint.path} is no model of the ToST release, whose layers are all tssa or all softmax, without "
            "options, in GPT-2's block with learned positions; use --to hf"
        )
    saved = {
        "model": release_state(config, dict(checkpoint.lm.named_parameters())),
        "model_args": release_arguments(config),
        "iter_num": state.step,
        "best_val_loss": state.validation_loss,
        "config": {},
    }
    save_pickle(saved, folder / RELEASE_FILE)
    (folder / checkpoint.tokenizer.file_name).write_bytes(checkpoint.tokenizer.content)
    tokens = random_documents(checkpoint)
    expected = source_logits(checkpoint, tokens)
    return [compare("logits of whole documents", release_logits(folder / RELEASE_FILE, tokens), expected)]


@torch.no_grad()
def release_logits(path: Path, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] that the release's model computes with a ckpt.pt's weights, in fp32."""
    arguments, state = load_release(path)
    heads, T = arguments["n_head"], tokens.shape[1]

    def weight(name: str) -> Tensor:
        return state[name].float()

    x = F.embedding(tokens, weight("transformer.wte.weight")) + weight("transformer.wpe.weight")[:T]  # [B, T, C]
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}."
        own = {name.removeprefix(block): weight(name) for name in state if name.startswith(block)}
        y = _linear(own, "attn.c_attn", _norm(own, "ln_1", x))
        y = _tssa(own, y, heads) if "attn.temp" in own else _attention(y, heads)
        x = x + own.get("gamma1", 1) * _linear(own, "attn.c_proj", y)
        y = F.gelu(_linear(own, "mlp.c_fc", _norm(own, "ln_2", x)))
        x = x + own.get("gamma2", 1) * _linear(own, "mlp.c_proj", y)
    last = {name.removeprefix("transformer."): weight(name) for name in state if ".ln_f." in name}
    return F.linear(_norm(last, "ln_f", x), weight("transformer.wte.weight"))


def _norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _tssa(weights: Mapping[str, Tensor], w: Tensor, heads: int) -> Tensor:
    bias = weights["attn.denom_bias"][:, : w.shape[1], 0].t()  # [T, H]
    y, _ = tssa_reference(Inputs(w, weights["attn.temp"].view(heads), bias, None, None))
    return y.to(w.dtype)


def _attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))  # [B, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
