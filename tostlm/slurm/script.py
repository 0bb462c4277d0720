"""The text of batch scripts, and the resources that they ask for."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tostlm.config import nearest
from tostlm.errors import UserError
from tostlm.slurm.history import LOGS, SITE

TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)  # sbatch(1), --time
# Options that the scripts set, or that would keep them from running; sbatch takes the last of two.
RESERVED = {
    "array",
    "chdir",
    "dependency",
    "error",
    "job-name",
    "nodes",
    "no-requeue",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
    "time",
    "wait",
    "wrap",
}

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
        """Return the options as sbatch reads them.

        Raises:
            UserError: one of them is none that sbatch takes, or that a job can have.
        """
        if self.time is not None and not TIME.fullmatch(self.time):
            raise UserError(
                f"--time {self.time} must be minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, as sbatch has it"
            )
        for option in self.sbatch:
            _check_option(option)
        if self.has_node_range:  # with --ntasks Slurm would take the fewest nodes that hold the tasks of MIN nodes
            ranks: dict[str, str | int | None] = {"mincpus": self.ranks_per_node * (self.cpus_per_rank or 1)}
        else:
            ranks = {"ntasks-per-node": self.ranks_per_node, "cpus-per-task": self.cpus_per_rank}
        named = {"nodes": self.nodes, **ranks, "gpus-per-node": self.gpus_per_node or None}
        named |= {"time": self.time, "partition": self.partition, "account": self.account, "qos": self.qos}
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return options + [f"--{option}" for option in self.sbatch]


def _check_option(option: str) -> None:
    """Check NAME=VALUE of --sbatch, as far as Slurm's commands here know their options."""
    name = option.partition("=")[0]
    if not re.fullmatch("[a-z][a-z0-9-]+", name):
        raise UserError(f"--sbatch {option} must be NAME or NAME=VALUE of an option of sbatch, as in constraint=h100")
    if name in RESERVED:
        raise UserError(f"--sbatch {option}: tostlm sets {name} itself, or by an option of its own; leave it out")
    known = _known_options()
    if known and name not in known:
        raise UserError(f"--sbatch {option}: sbatch has no option {name}{nearest(name, known)}")


@functools.cache
def _known_options() -> frozenset[str]:
    """Return the names of sbatch's options; empty where it is not installed or not configured."""
    with suppress(OSError, subprocess.SubprocessError):
        printed = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, timeout=60).stdout
        return frozenset(re.findall(r"--([a-z][a-z0-9-]+)", printed))
    return frozenset()


def batch_script(
    kind: str,
    job_name: str,
    folder: Path,
    resources: Resources,
    commands: Sequence[str],
    array_size: int = 0,
    warning_seconds: int | None = None,
) -> str:
    """Return the text of a batch script that a person can read and submit again by hand.

    Args:
        kind: the subcommand of `tostlm submit` that makes it.
        folder: see tostlm/slurm/history.py; it holds site.env, which the script sources, and the log.
        commands: shell commands; the last one replaces the shell.
        array_size: tasks of an array; 0 for a single job.
        warning_seconds: how long before its time limit the script gets SIGUSR1; None for no warning.

    Raises:
        UserError: a name cannot stand in a batch script, or an option is wrong.
    """
    *before, last = commands
    logs = str(folder.absolute() / LOGS)
    if "\\" in logs:
        raise UserError(
            f"{folder} has a backslash, which Slurm does not take in the names of logs; choose another folder"
        )
    logs = logs.replace("%", "%%")  # Slurm's own replacements begin with it
    options = [
        f"--job-name={job_name}",
        *resources.sbatch_options(),
        "--requeue",
        "--open-mode=append",
        f"--output={logs}/{'%A_%a' if array_size else '%j'}.log",
        f"--chdir={Path.cwd()}",
        *([f"--array=0-{array_size - 1}"] if array_size else []),
        *([f"--signal=B:USR1@{warning_seconds}"] if warning_seconds is not None else []),
    ]
    for option in options:
        if not option.isprintable():
            raise UserError(f"{option!r} has control characters, such as a line break; choose names without them")
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
