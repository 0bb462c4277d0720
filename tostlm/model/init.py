"""Creating an initialized model, and the optimizer's parameter groups: the authors' recipe, as nanoGPT's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM


def create_lm(config: ModelConfig, seed: int) -> LM:
    """Build a model on the CPU and initialize its weights: the same on every machine for one seed."""
    with torch.device("meta"):
        lm = LM(config)
    lm.to_empty(device="cpu")
    lm.reset_parameters(torch.Generator().manual_seed(seed))
    return lm


def parameter_groups(lm: LM, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices and embeddings decay; norms, gains, and what mixers exempt do not.

    Args:
        lm: the model.
        weight_decay: of the first group.

    Returns:
        Two groups in torch's form, named "decay" and "no_decay".
    """
    exempt = {
        id(parameter)
        for block in lm.blocks
        for name, parameter in block.mixer.named_parameters()
        if name in block.mixer.no_weight_decay
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in lm.parameters():
        groups[parameter.dim() >= 2 and id(parameter) not in exempt].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    ]
