"""The language models: ToST, GPT-2 and hybrids of the two."""

from tostlm.model.config import ModelConfig
from tostlm.model.device import best_device, device_name, supports_matmul
from tostlm.model.flops import count_parameters, training_flops_per_token
from tostlm.model.init import create_lm, parameter_groups
from tostlm.model.lm import LM, LMState
from tostlm.model.loss import IGNORE

__all__ = [
    "IGNORE",
    "LM",
    "LMState",
    "ModelConfig",
    "best_device",
    "count_parameters",
    "create_lm",
    "device_name",
    "parameter_groups",
    "supports_matmul",
    "training_flops_per_token",
]
