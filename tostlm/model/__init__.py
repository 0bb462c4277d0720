"""Language models: ToST, GPT-2 and hybrids, with a token mixer per layer."""

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.cost import count_parameters, state_bytes, training_flops_per_token
from tostlm.model.device import best_device, device_name, supports_matmul
from tostlm.model.init import create_lm, parameter_groups
from tostlm.model.lm import LM, LMState, state_tensors
from tostlm.model.loss import IGNORE
from tostlm.model.mixers.base import MIXERS, Mixer, options_from_dict

__all__ = [
    "IGNORE",
    "LM",
    "MIXERS",
    "LMState",
    "Mixer",
    "MixerOptions",
    "ModelConfig",
    "best_device",
    "count_parameters",
    "create_lm",
    "device_name",
    "options_from_dict",
    "parameter_groups",
    "state_bytes",
    "state_tensors",
    "supports_matmul",
    "training_flops_per_token",
]
