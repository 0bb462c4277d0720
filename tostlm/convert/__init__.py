"""Checkpoints for other software, and other software's models as checkpoints."""

from tostlm.convert.conversion import FORMATS, convert
from tostlm.convert.hf import sample, write_hf
from tostlm.convert.verify import Comparison

__all__ = ["FORMATS", "Comparison", "convert", "sample", "write_hf"]
