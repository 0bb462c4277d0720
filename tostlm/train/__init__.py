"""Training under DeepSpeed."""

from tostlm.train.loop import train

__all__ = ["train"]
