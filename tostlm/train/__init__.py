"""Training under DeepSpeed."""

import os

import torch

if not torch.accelerator.is_available():  # before DeepSpeed is imported, which else warns that it found no GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tostlm.train.loop import train

__all__ = ["train"]
