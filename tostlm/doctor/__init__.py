"""Checks of what would spoil a run, made on all ranks before it starts. Problems are named by rank and host."""

from tostlm.doctor.checks import run_doctor
from tostlm.doctor.run_inputs import model_memory_bytes

__all__ = ["model_memory_bytes", "run_doctor"]
