"""The command line: one module for the subcommands of each area, which import the library only when they run."""

from tostlm.cli import bench, data, evaluate, generate, slurm, study, train  # noqa: F401  importing them registers them
from tostlm.cli.app import app

__all__ = ["app"]
