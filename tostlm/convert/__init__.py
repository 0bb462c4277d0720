"""Checkpoints for other software."""

from tostlm.convert.hf import export_hf, sample

__all__ = ["export_hf", "sample"]
