"""Language models: ToST, GPT-2 and hybrids, with a token mixer per layer."""

from tostlm.model.build import (
    GroupRule,
    count_body_parameters,
    count_parameters,
    create_lm,
    hidden_matrices,
    largest_part_numel,
    matching_rule,
    parameter_groups,
    parameter_names,
    state_bytes,
    training_flops_per_token,
    weight_shapes,
)
from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.lm import LM, LMState, state_tensors
from tostlm.model.loss import IGNORE, perplexity
from tostlm.model.mixers.base import MIXERS, Mixer
from tostlm.model.statistics import layer_statistics

__all__ = [
    "IGNORE",
    "LM",
    "MIXERS",
    "GroupRule",
    "LMState",
    "Mixer",
    "MixerOptions",
    "ModelConfig",
    "count_body_parameters",
    "count_parameters",
    "create_lm",
    "hidden_matrices",
    "largest_part_numel",
    "layer_statistics",
    "matching_rule",
    "parameter_groups",
    "parameter_names",
    "perplexity",
    "state_bytes",
    "state_tensors",
    "training_flops_per_token",
    "weight_shapes",
]
