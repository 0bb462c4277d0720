"""GPT-2 as Hugging Face has it: its config.json, and its tensors, whose matrices are [in, out].

Source: transformers' `GPT2Config` and `GPT2LMHeadModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tostlm.errors import UserError
from tostlm.formats.naming import ForeignTensor, gpt2_name, require_depth, take_weights
from tostlm.model import ModelConfig, weight_shapes
from tostlm.model.mixers.softmax import SoftmaxOptions

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}  # tostlm's names and transformers'
SAME_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}
LAYER_NORM_EPS = 1e-5
# What GPT-2's class computes otherwise with another value, and is imported with this one alone.
COMPUTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": LAYER_NORM_EPS,
}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks that older versions saved


def is_gpt2(config: ModelConfig) -> bool:
    """Return whether GPT2LMHeadModel holds the model: plain softmax in every layer, learned positions, LayerNorm."""
    softmax = all(options == SoftmaxOptions() for options in config.layer_plan)
    plain = config.norm == "layernorm" and config.mlp in ACTIVATIONS and config.logit_softcap is None
    skips = config.embed_norm or config.value_residual or config.embed_skip
    return softmax and plain and not skips and config.positions is not None


def gpt2_config(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """Return the fields of the GPT2Config of a model that `is_gpt2`."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.positions,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_channels,
        "activation_function": ACTIVATIONS[config.mlp],
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
    }


def gpt2_tensors(config: ModelConfig) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
    """Return GPT2LMHeadModel's tensors by name, each a function that makes it of the model's weights.

    LayerScale, which GPT-2 has not, is folded into the output projections, in fp32; biases that the model does not have
    are zero.
    """
    own = _foreign_tensors(config)
    dtype = torch.float32 if config.layer_scale is not None else None  # a product would be rounded in bf16
    found: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {}
    for name, foreign in own.items():
        found[foreign.name] = lambda weights, name=name, foreign=foreign: foreign.to_foreign(  # type: ignore[misc]
            _scaled(weights, name).to(dtype or weights[name].dtype)
        )
    if not config.bias:
        for name, shape in weight_shapes(config).items():
            if name.startswith(("blocks.", "norm.")) and name.endswith(".weight"):
                key = f"{gpt2_name(name).removesuffix('weight')}bias"
                found[key] = lambda weights, n=shape[0]: torch.zeros(  # type: ignore[misc]
                    n, dtype=dtype or weights["embed.weight"].dtype
                )
    return found


def _scaled(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a weight, that of an output projection times the gain of its branch."""
    for projection, gain in ((".mixer.out_proj.", ".scale_mixer"), (".mlp.out_proj.", ".scale_mlp")):
        block, found, leaf = name.partition(projection)
        if found and f"{block}{gain}" in weights:
            scale = weights[f"{block}{gain}"].float()
            return weights[name].float() * (scale[:, None] if leaf == "weight" else scale)
    return weights[name]


def read_gpt2(
    fields: Mapping[str, Any], theirs: Mapping[str, Tensor], where: str
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model that a config.json describes and its weights, out of the folder's tensors.

    Raises:
        UserError: GPT-2's class computes it otherwise than tostlm does, or the tensors are not those of the model.
    """
    for key, expected in COMPUTED.items():
        if (value := fields.get(key, expected)) != expected:
            raise UserError(f"{where}: with {key} {value} tostlm would compute other logits; only {expected} is known")
    activations = {theirs: own for own, theirs in ACTIVATIONS.items()} | SAME_ACTIVATIONS
    activation = fields.get("activation_function", "gelu_new")
    if activation not in activations:
        raise UserError(f"{where}: activation_function {activation} is not known; {', '.join(activations)} are")
    # Some have it of the body alone.
    prefix = "" if any(name.startswith("transformer.") for name in theirs) else "transformer."
    tensors = {
        name if name.startswith("lm_head.") else f"{prefix}{name}": tensor
        for name, tensor in theirs.items()
        if not name.endswith(BUFFERS)
    }
    tied = fields.get("tie_word_embeddings", True)
    if tied:
        _drop_tied(tensors, where)
    elif "lm_head.weight" not in tensors:
        raise UserError(f"{where} has no lm_head.weight, and its embeddings are not tied; it is damaged")
    width = fields["n_embd"]
    config = ModelConfig(
        depth=fields["n_layer"],
        width=width,
        heads=fields["n_head"],
        vocab_size=fields["vocab_size"],
        positions=fields.get("n_positions", fields.get("n_ctx")),
        layers=(SoftmaxOptions(),),
        layer_scale=None,
        bias=True,
        mlp=activations[activation],  # type: ignore[arg-type]
        mlp_width=None if fields.get("n_inner") in (None, 4 * width) else fields["n_inner"],
        tie_embeddings=tied,
    )
    require_depth(config, tensors)
    return config, take_weights(tensors, _foreign_tensors(config), weight_shapes(config), where)


def _drop_tied(tensors: dict[str, Tensor], where: str) -> None:
    """Leave out the output projection where it is the embedding's copy."""
    head, embed = tensors.pop("lm_head.weight", None), tensors.get("transformer.wte.weight")
    if head is not None and embed is not None and not torch.equal(head, embed):
        raise UserError(f"{where}: lm_head.weight is not transformer.wte.weight, to which its config ties it")


def _foreign_tensors(config: ModelConfig) -> dict[str, ForeignTensor]:
    """Return what GPT2LMHeadModel has each parameter as, but for LayerScale."""
    found = {}
    for name, shape in weight_shapes(config).items():
        if name.endswith((".scale_mixer", ".scale_mlp")):
            continue
        matrix = name.startswith("blocks.") and len(shape) == 2
        found[name] = ForeignTensor(gpt2_name(name), *([torch.t, torch.t] if matrix else []))
    return found
