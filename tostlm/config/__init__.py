"""Run configurations: one YAML file per run, strict and frozen, with dotted overrides."""

from tostlm.config.fields import OnResume, Section, fixed_keys
from tostlm.config.files import dump_config, load_config
from tostlm.config.sections import (
    DEEPSPEED_KEYS,
    BatchPlan,
    DataConfig,
    RunConfig,
    TrainConfig,
    batch_plan,
    matmul_dtype,
)
from tostlm.config.shipped import find_config, shipped_configs

__all__ = [
    "DEEPSPEED_KEYS",
    "BatchPlan",
    "DataConfig",
    "OnResume",
    "RunConfig",
    "Section",
    "TrainConfig",
    "batch_plan",
    "dump_config",
    "find_config",
    "fixed_keys",
    "load_config",
    "matmul_dtype",
    "shipped_configs",
]
