"""Run configurations: one YAML file a run, strict, frozen, with dotted overrides."""

from tostlm.config.files import dump_config, load_config
from tostlm.config.sections import DEEPSPEED_KEYS, BatchPlan, DataConfig, RunConfig, batch_plan, matmul_dtype
from tostlm.config.training import TrainConfig

__all__ = [
    "DEEPSPEED_KEYS",
    "BatchPlan",
    "DataConfig",
    "RunConfig",
    "TrainConfig",
    "batch_plan",
    "dump_config",
    "load_config",
    "matmul_dtype",
]
