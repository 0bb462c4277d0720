"""Slurm's own commands. What one refuses is the user's to read, in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.errors import UserError

TIMEOUT_SECONDS = 60
PATIENCE_SECONDS, RETRY_SECONDS = 1800, 10  # of a job for a controller that is away, as while it is restarted
AWAY = re.compile(
    "Unable to contact slurm controller|Socket timed out|Connection refused|Transport endpoint|Zero Bytes were"
    "|standby mode|temporarily unable"
)
PREFIX = re.compile(r"^(sbatch|scontrol|squeue|scancel|slurm_\w+)?\s*(error|allocation failure)?:\s*")
SITE_THEN_SBATCH = '[ -z "$0" ] || . "$0" >&2; exec sbatch "$@"'


class Queued(NamedTuple):
    """A job that waits or runs. Those of an array are one each, ARRAY_INDEX."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str
    nodes: str


def slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: it is not on this machine, it refuses, or nobody answers it.
    """
    # A batch script can wait; a person is told. What was submitted once may be queued though nobody said so.
    patient = "SLURM_PROCID" in os.environ and command[0] != "bash"
    deadline = time.monotonic() + (PATIENCE_SECONDS if patient else 0)
    while True:
        try:
            return _ask(command, environment)
        except _Away as error:
            if time.monotonic() >= deadline:
                raise UserError(f"{error}; try again when Slurm's controller is up") from None
            time.sleep(RETRY_SECONDS)


class _Away(Exception):
    """The controller does not answer."""


def _ask(command: Sequence[str], environment: dict[str, str] | None) -> str:
    program, *arguments = ("sbatch", *command[4:]) if command[0] == "bash" else command
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment)
    except FileNotFoundError:
        done = None
    except subprocess.TimeoutExpired:
        raise _Away(f"{program} has no answer for {TIMEOUT_SECONDS} s") from None
    if done is None or done.returncode == 127:
        raise UserError(f"{program} is not on this machine; run this where Slurm's commands are, as on a login node")
    if done.returncode:
        if found := AWAY.search(done.stderr):
            raise _Away(f"{program}: {found[0]}")
        lines = [PREFIX.sub("", line) for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise UserError(f"Slurm refuses: {'; '.join(lines)} (`{program} {' '.join(arguments)}`)")
    return done.stdout.strip()


def submit_script(script: Path, site: Path | None, *options: str) -> str:
    """Submit a script, with what site.env sets for sbatch; returns the job's number.

    Raises:
        UserError: Slurm refuses it; nothing is queued then.
    """
    # A job that submits another hands nothing of its own allocation on.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SRUN_"))}
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    sbatch = ["bash", "-c", SITE_THEN_SBATCH, str(site or "")]
    said = slurm(*sbatch, "--parsable", *options, str(script), environment=environment)
    job = said.splitlines()[-1].partition(";")[0]  # ; and a cluster's name
    if not job.isdecimal():
        raise UserError(f"sbatch named no job: {said!r}; look for it with squeue")
    return job


def submit_after(jobs: Sequence[str], script: Path, site: Path | None, *options: str) -> str:
    """Submit a script that comes after jobs submitted before; where Slurm refuses it, they are cancelled too.

    Raises:
        UserError: Slurm refuses it.
    """
    try:
        return submit_script(script, site, *options)
    except UserError:  # all, or nothing
        slurm("scancel", *jobs)
        raise


def queued(jobs: Iterable[str]) -> list[Queued]:
    """Those of some jobs that wait or run; of an array its parts."""
    lines = slurm("squeue", "--me", "--all", "--noheader", "--array", "--format=%i|%T|%r|%N").splitlines()
    found = [Queued(*line.split("|")) for line in lines]
    return [job for number in jobs for job in found if number in (job.job, job.job.partition("_")[0])]


def requeue(job: str, delay_seconds: float, exclude: Sequence[str]) -> None:
    """Have this very job start anew, not before a time and not on some nodes.

    Slurm ends the batch script that asks for it by SIGTERM, which is not heard here: the job is pending again by then,
    and can be changed as long as the script lives.
    """
    changes = [f"StartTime=now+{delay_seconds:.0f}"] if delay_seconds else []
    if exclude:
        before = slurm("squeue", "--noheader", "--jobs", job, "--format=%x").replace("(null)", "")
        changes.append(f"ExcNodeList={','.join(filter(None, [before, *exclude]))}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nor by the commands that are started from here on
    try:
        slurm("scontrol", "requeue", job)
    except UserError:  # an answer that was lost, and the same question once more
        if [found.state for found in queued([job])] != ["PENDING"]:
            raise
    if changes:
        slurm("scontrol", "update", f"JobId={job}", *changes)
