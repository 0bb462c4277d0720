"""The command line: one module for the subcommands of each area, which import the library only when they run."""

# Importing them registers them.
from tostlm.cli import bench, checkpoints, data, evaluate, generate, plan, slurm, study, train  # noqa: F401
from tostlm.cli.app import app

__all__ = ["app"]
