"""Parameters under the names that GPT-2's family has for them, and taking a model's weights by such names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.errors import UserError
from tostlm.model import ModelConfig, weight_shapes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights
# tostlm's names and GPT-2's: of a model's modules, of a block's modules, and of a block's parameters beside those.
MODULES = {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
BLOCK_MODULES = {
    "norm_mixer": "ln_1",
    "mixer.in_proj": "attn.c_attn",
    "mixer.out_proj": "attn.c_proj",
    "norm_mlp": "ln_2",
    "mlp.in_proj": "mlp.c_fc",
    "mlp.out_proj": "mlp.c_proj",
}
# The ToST release's own: https://github.com/RobinWu218/ToST, tost_lang/model_TSSA.py.
BLOCK_PARAMETERS = {
    "scale_mixer": "gamma1",
    "scale_mlp": "gamma2",
    "mixer.temp": "attn.temp",
    "mixer.bias": "attn.denom_bias",
}


def _same(tensor: Tensor) -> Tensor:
    return tensor


class ForeignTensor(NamedTuple):
    """A parameter as another format has it: under a name, and in a form of its own."""

    name: str
    to_foreign: Callable[[Tensor], Tensor] = _same
    to_own: Callable[[Tensor], Tensor] = _same


def gpt2_name(own: str) -> str:
    """Return GPT-2's name of a parameter that tostlm's GPT-2 or ToST has."""
    if not own.startswith("blocks."):
        module, _, leaf = own.rpartition(".")
        return f"{MODULES[module]}.{leaf}"
    _, layer, inside = own.split(".", 2)
    if inside in BLOCK_PARAMETERS:
        return f"transformer.h.{layer}.{BLOCK_PARAMETERS[inside]}"
    module, _, leaf = inside.rpartition(".")
    return f"transformer.h.{layer}.{BLOCK_MODULES[module]}.{leaf}"


def require_depth(config: ModelConfig, theirs: Sized) -> None:
    """Check, before a model is built, that there are as many tensors as it has blocks, and no longer a layer plan.

    Raises:
        ValueError: there are not.
    """
    layers = max(config.depth, len(config.layers))
    if layers > len(theirs):
        raise ValueError(f"{layers:,} layers, and {len(theirs):,} tensors")


def require_tensor(tensor: Tensor, name: str, shape: torch.Size, where: str) -> None:
    """Check that a tensor of a file is a parameter of a shape; raise a UserError that names it and `where` if not."""
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
    if not dense or tensor.shape != shape or tensor.dtype not in DTYPES:
        kind = f"{tuple(tensor.shape)} {tensor.dtype}" if dense else "no plain tensor"
        raise UserError(f"{where}: {name} is {kind}; its model has {tuple(shape)} numbers in fp16, bf16, fp32 or fp64")


def take_weights(
    theirs: Mapping[str, Tensor], tensors: Mapping[str, ForeignTensor], shapes: Mapping[str, torch.Size], where: str
) -> dict[str, Tensor]:
    """Return a model's weights by tostlm's names, out of the tensors that another format has, each one once.

    Args:
        theirs: all tensors that hold parameters.
        tensors: of each parameter, what `theirs` has it as.
        shapes: of the parameters.
        where: the file or folder, for the user.

    Raises:
        UserError: a tensor is missing, of another shape, no number, or left over.
    """
    weights = {}
    for own, foreign in tensors.items():
        if foreign.name not in theirs:
            raise UserError(f"{where} has no tensor {foreign.name}; it is damaged, or of another model than it says")
        found, asked = theirs[foreign.name], foreign.to_foreign(torch.empty(shapes[own])).shape
        require_tensor(found, foreign.name, asked, where)
        weights[own] = foreign.to_own(found).resolve_neg()
    if left := sorted(theirs.keys() - {foreign.name for foreign in tensors.values()}):
        raise UserError(f"{where} has tensors that its model does not: {', '.join(left[:5])}; it cannot be imported")
    return weights


def take_own_weights(
    theirs: Mapping[str, Tensor], config: ModelConfig, where: str, prefix: str = ""
) -> dict[str, Tensor]:
    """Return a model's weights out of tensors under tostlm's own names, behind a prefix; see `take_weights`."""
    shapes = weight_shapes(config)
    return take_weights(theirs, {name: ForeignTensor(prefix + name) for name in shapes}, shapes, where)
