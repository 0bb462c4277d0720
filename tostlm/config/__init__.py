"""Run configurations: one YAML file a run, strict, frozen, with dotted overrides."""

from tostlm.config.files import dump_config, load_config
from tostlm.config.sections import DEEPSPEED_KEYS, Batches, DataConfig, RunConfig, batches

__all__ = ["DEEPSPEED_KEYS", "Batches", "DataConfig", "RunConfig", "batches", "dump_config", "load_config"]
