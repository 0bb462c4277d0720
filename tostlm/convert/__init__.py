"""Checkpoints for other software. `transformers` is imported here alone."""

from tostlm.convert.hf import export_hf, sample

__all__ = ["export_hf", "sample"]
