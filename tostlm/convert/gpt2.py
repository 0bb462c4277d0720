"""Converting a GPT-2 model to transformers' own GPT2LMHeadModel."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tostlm.model import LM
from tostlm.model.block import Block
from tostlm.model.mixers.softmax import SoftmaxAttention, SoftmaxOptions

ACTIVATIONS = ("gelu", "relu2")  # transformers has them under the same names


def is_gpt2(lm: LM) -> bool:
    """Return whether GPT2LMHeadModel holds the model: plain softmax in every layer, learned positions, LayerNorm."""
    config = lm.config
    softmax = all(options == SoftmaxOptions() for options in config.layer_plan)
    plain = config.norm == "layernorm" and config.mlp in ACTIVATIONS and config.logit_softcap is None
    skips = config.embed_norm or config.value_residual or config.embed_skip
    return softmax and plain and not skips and config.positions is not None


def to_gpt2(lm: LM, eos_id: int) -> GPT2LMHeadModel:
    """Return a GPT2LMHeadModel that computes the same logits, in fp32.

    LayerScale is folded into the output projections, which bf16 would round; biases that the model does not have are
    zero.
    """
    lm = copy.deepcopy(lm).float()
    config = GPT2Config(
        vocab_size=lm.config.vocab_size,
        n_positions=lm.config.positions,
        n_embd=lm.config.width,
        n_layer=lm.config.depth,
        n_head=lm.config.heads,
        n_inner=lm.config.mlp_channels,
        activation_function=lm.config.mlp,
        layer_norm_epsilon=lm.norm.eps,
        tie_word_embeddings=lm.config.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        dtype=torch.float32,
    )
    model = GPT2LMHeadModel(config)
    assert lm.positions is not None
    weights = {"wte.weight": lm.embed.weight, "wpe.weight": lm.positions.weight, **_named("ln_f", lm.norm)}
    for layer, block in enumerate(lm.blocks):
        weights |= {f"h.{layer}.{name}": value for name, value in _block(block).items()}
    state = {name: torch.zeros_like(value) for name, value in model.transformer.state_dict().items()}
    model.transformer.load_state_dict(state | weights)
    if lm.head is not None:
        model.lm_head.weight = nn.Parameter(lm.head.weight)
    return model.eval()


def _block(block: Block) -> dict[str, Tensor]:
    mixer = block.mixer
    assert isinstance(mixer, SoftmaxAttention)
    return {
        **_named("ln_1", block.norm_mixer),
        **_named("attn.c_attn", mixer.in_proj),
        **_named("attn.c_proj", mixer.out_proj, block.scale_mixer),
        **_named("ln_2", block.norm_mlp),
        **_named("mlp.c_fc", block.mlp.in_proj),
        **_named("mlp.c_proj", block.mlp.out_proj, block.scale_mlp),
    }


def _named(name: str, module: nn.Module, scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of a norm or linear layer as GPT-2 has them, matrices as [in, out], with its output scaled."""
    tensors = {f"{name}.{key}": tensor.t() for key, tensor in module.named_parameters()}
    return {key: tensor if scale is None else scale * tensor for key, tensor in tensors.items()}
