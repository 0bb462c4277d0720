"""Training under DeepSpeed: `train` runs on every rank."""

from tostlm.config import use_cpu_without_gpu

use_cpu_without_gpu()

from tostlm.train.trainer import train  # noqa: E402  (it imports DeepSpeed)

__all__ = ["train"]
