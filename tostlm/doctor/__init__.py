"""Checks of what would spoil a run, made on all ranks before it starts. Problems are named by rank and host."""

from tostlm.doctor.checks import run_doctor

__all__ = ["run_doctor"]
