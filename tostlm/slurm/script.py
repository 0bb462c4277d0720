"""The text of batch scripts, and the resources that they ask for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tostlm.errors import UserError
from tostlm.slurm.history import LOGS, SITE

TEMPLATES = Path(__file__).parent / "templates"  # in a checkout a link to slurm/, in a wheel the files themselves


@dataclass(frozen=True)
class Resources:
    """What a job asks of Slurm. For what is None, site.env's SBATCH_* or the cluster's default holds."""

    nodes: str = "1"  # a number, or MIN-MAX
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: Sequence[str] = ()  # NAME=VALUE of any other option of sbatch

    def node_range(self) -> tuple[int, int]:
        """Return the smallest and the largest number of nodes; they differ only for MIN-MAX.

        Raises:
            UserError: `nodes` is neither a number nor a range.
        """
        parts = self.nodes.split("-")
        if len(parts) > 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) <= int(parts[-1]):
            raise UserError(f"--nodes {self.nodes} must be a number, or the fewest and the most, as in 2-4")
        return int(parts[0]), int(parts[-1])

    @property
    def has_node_range(self) -> bool:
        """Whether Slurm chooses the number of nodes at each start."""
        fewest, most = self.node_range()
        return fewest < most

    def sbatch_options(self) -> list[str]:
        if self.has_node_range:  # with --ntasks Slurm would take the fewest nodes that hold the tasks of MIN nodes
            ranks: dict[str, str | int | None] = {"mincpus": self.ranks_per_node * (self.cpus_per_rank or 1)}
        else:
            ranks = {"ntasks-per-node": self.ranks_per_node, "cpus-per-task": self.cpus_per_rank}
        named = {"nodes": self.nodes, **ranks, "gpus-per-node": self.gpus_per_node or None}
        named |= {"time": self.time, "partition": self.partition, "account": self.account, "qos": self.qos}
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return options + [f"--{option}" for option in self.sbatch]


def batch_script(
    kind: str, job_name: str, folder: Path, resources: Resources, commands: Sequence[str], array_size: int = 0
) -> str:
    """Return the text of a batch script that a person can read and submit again by hand.

    Args:
        kind: the subcommand of `tostlm submit` that makes it.
        folder: see tostlm/slurm/history.py; it holds site.env, which the script sources, and the log.
        commands: shell commands; the last one replaces the shell.
        array_size: tasks of an array; 0 for a single job.
    """
    *before, last = commands
    options = [
        f"--job-name={job_name}",
        *resources.sbatch_options(),
        "--requeue",
        "--open-mode=append",
        f"--output={folder.absolute() / LOGS}/{'%A_%a' if array_size else '%j'}.log",
        f"--chdir={Path.cwd()}",
        *([f"--array=0-{array_size - 1}"] if array_size else []),
    ]
    lines = [
        "#!/usr/bin/env bash",
        f"# Made by `tostlm submit {kind}`; it can be submitted again by hand with sbatch.",
        *(f"#SBATCH {shlex.quote(option)}" for option in options),
        "",
        "set -euo pipefail",
        "trap '' USR1",  # a request to stop must not end the script before the last command handles it
        f". {shlex.quote(str(folder.absolute() / SITE))}",
        *before,
        f"exec {last}",
    ]
    return "\n".join(lines) + "\n"
