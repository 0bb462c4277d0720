"""The command line: a verb for each arrow of the data's way."""

from tostlm.cli import data, models, slurm  # noqa: F401  they add their verbs
from tostlm.cli.app import app

__all__ = ["app"]
