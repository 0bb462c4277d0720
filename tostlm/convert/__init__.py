"""Checkpoints for other software. `transformers` is imported here alone."""

from tostlm.convert.hf import export_hf

__all__ = ["export_hf"]
