"""Parameters under the names that GPT-2's family has for them, and taking a model's weights by such names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.errors import UserError

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
        if found.shape != asked or not found.is_floating_point():
            raise UserError(
                f"{where}: {foreign.name} is {tuple(found.shape)} {found.dtype}; its model has {tuple(asked)} numbers"
            )
        weights[own] = foreign.to_own(found)
    if left := sorted(theirs.keys() - {foreign.name for foreign in tensors.values()}):
        raise UserError(f"{where} has tensors that its model does not: {', '.join(left[:5])}; it cannot be imported")
    return weights
