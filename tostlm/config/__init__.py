"""Run configurations: one YAML file a run, strict, frozen, with dotted overrides."""

from tostlm.config.files import dump_config, load_config
from tostlm.config.sections import DEEPSPEED_KEYS, Batches, DataConfig, RunConfig, batches, matrix_dtype
from tostlm.config.training import TrainConfig

__all__ = [
    "DEEPSPEED_KEYS",
    "Batches",
    "DataConfig",
    "RunConfig",
    "TrainConfig",
    "batches",
    "dump_config",
    "load_config",
    "matrix_dtype",
]
