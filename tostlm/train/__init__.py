"""Training under DeepSpeed: `train` runs on every rank."""

import os

import torch

if not torch.accelerator.is_available():  # set before DeepSpeed is imported, which otherwise warns that it found no GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tostlm.train.trainer import train

__all__ = ["train"]
