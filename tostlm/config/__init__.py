"""Run configurations: one YAML file per run, strict and frozen, with dotted overrides."""

from tostlm.config.deepspeed_block import nearest, use_cpu_without_gpu, zero_block
from tostlm.config.files import (
    FOLDER,
    dump_config,
    find_config,
    load_config,
    read_mapping,
    restore_config,
    shipped_configs,
    training_config,
    validate_mapping,
)
from tostlm.config.sections import (
    BatchPlan,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    Strict,
    TrainConfig,
    batch_plan,
    fixed_values,
    matmul_dtype,
)

__all__ = [
    "FOLDER",
    "BatchPlan",
    "PositiveFloat",
    "PositiveInt",
    "RunConfig",
    "Strict",
    "TrainConfig",
    "batch_plan",
    "dump_config",
    "find_config",
    "fixed_values",
    "load_config",
    "matmul_dtype",
    "nearest",
    "read_mapping",
    "restore_config",
    "shipped_configs",
    "training_config",
    "use_cpu_without_gpu",
    "validate_mapping",
    "zero_block",
]
