"""The text of batch scripts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tostlm.errors import UserError


@dataclass(frozen=True)
class Resources:
    """What a job asks of Slurm. Where one is None, site.env's SBATCH_* or the cluster's default stands."""

    nodes: str = "1"  # or as few and as many, 2-4
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    more: Sequence[str] = field(default_factory=tuple)  # NAME=VALUE of any other option of sbatch

    def fewest_and_most_nodes(self) -> tuple[int, int]:
        """They are the same but for a range.

        Raises:
            UserError: `nodes` says neither.
        """
        parts = self.nodes.split("-")
        if len(parts) > 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) <= int(parts[-1]):
            raise UserError(f"--nodes {self.nodes} must be a number, or the fewest and the most, as in 2-4")
        return int(parts[0]), int(parts[-1])

    @property
    def ranged(self) -> bool:
        """Whether the number of nodes is left to Slurm."""
        fewest, most = self.fewest_and_most_nodes()
        return fewest < most

    def options(self) -> list[str]:
        """As sbatch takes them."""
        if self.ranged:  # told of tasks, Slurm would take the fewest nodes that hold those of the fewest
            ranks: dict[str, int | None] = {"mincpus": self.ranks_per_node * (self.cpus_per_rank or 1)}
        else:
            ranks = {"ntasks-per-node": self.ranks_per_node, "cpus-per-task": self.cpus_per_rank}
        named = {
            "nodes": self.nodes,
            **ranks,
            "gpus-per-node": self.gpus_per_node or None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
        }
        return [f"--{name}={value}" for name, value in named.items() if value is not None] + [
            f"--{option}" for option in self.more
        ]

    def settings(self) -> list[str]:
        """What the script itself sets, of a range of nodes."""
        return [f"export SLURM_CPUS_PER_TASK={self.cpus_per_rank}"] if self.ranged and self.cpus_per_rank else []


def batch_script(made_by: str, options: Sequence[str], site: Path | None, commands: Sequence[str]) -> str:
    """A script that a person can read: options of sbatch, the site's settings, commands, the last in place of bash.

    A request to stop that comes before that command listens is left unheard: it must not end the script.
    """
    *before, last = commands
    lines = [
        "#!/usr/bin/env bash",
        f"# Made by `{made_by}`; it can be submitted again by hand with sbatch.",
        *(f"#SBATCH {shlex.quote(option)}" for option in options),
        "",
        "set -euo pipefail",
        "trap '' USR1",
        *([f". {shlex.quote(str(site))}"] if site else []),
        *before,
        f"exec {last}",
    ]
    return "\n".join(lines) + "\n"
