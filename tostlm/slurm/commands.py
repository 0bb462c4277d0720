"""Slurm's own commands. What a command refuses becomes a UserError of one line."""

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

COMMAND_TIMEOUT_SECONDS = 60
# How long a job retries while the controller does not answer, as during its restart.
RETRY_TIMEOUT_SECONDS, RETRY_INTERVAL_SECONDS = 1800, 10
CONTROLLER_DOWN = re.compile(
    "Unable to contact slurm controller|Socket timed out|Connection refused|Transport endpoint|Zero Bytes were"
    "|standby mode|temporarily unable"
)
ERROR_PREFIX = re.compile(r"^(sbatch|scontrol|squeue|scancel|slurm_\w+)?\s*(error|allocation failure)?:\s*")
SOURCE_SITE_THEN_SBATCH = '[ -z "$0" ] || . "$0" >&2; exec sbatch "$@"'


class QueuedJob(NamedTuple):
    """A job that is pending or running. Each task of an array is a job of its own, ARRAY_INDEX."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it is pending
    nodes: str


class _ControllerDown(Exception):
    """Slurm's controller does not answer."""


def run_slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return what it prints.

    Inside a job it is retried while the controller does not answer. Outside, where a person waits, it is not.

    Raises:
        UserError: the command is not on this machine or refuses, or the controller does not answer.
    """
    # sbatch, which runs through bash, is never retried: the job may be queued although the answer was lost.
    retries = "SLURM_PROCID" in os.environ and command[0] != "bash"
    deadline = time.monotonic() + (RETRY_TIMEOUT_SECONDS if retries else 0)
    while True:
        try:
            return _run_once(command, environment)
        except _ControllerDown as error:
            if time.monotonic() >= deadline:
                raise UserError(f"{error}; try again when Slurm's controller is up") from None
            time.sleep(RETRY_INTERVAL_SECONDS)


def _run_once(command: Sequence[str], environment: dict[str, str] | None) -> str:
    program, *arguments = ("sbatch", *command[4:]) if command[0] == "bash" else command
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, env=environment
        )
    except FileNotFoundError:
        result = None
    except subprocess.TimeoutExpired:
        raise _ControllerDown(f"{program} did not answer within {COMMAND_TIMEOUT_SECONDS} s") from None
    if result is None or result.returncode == 127:
        raise UserError(f"{program} is not on this machine; run this where Slurm's commands are, as on a login node")
    if result.returncode:
        if found := CONTROLLER_DOWN.search(result.stderr):
            raise _ControllerDown(f"{program}: {found[0]}")
        lines = [ERROR_PREFIX.sub("", ln) for ln in f"{result.stdout}\n{result.stderr}".splitlines() if ln.strip()]
        raise UserError(f"Slurm refuses: {'; '.join(lines)} (`{program} {' '.join(arguments)}`)")
    return result.stdout.strip()


def submit_script(script: Path, site: Path | None, *options: str) -> str:
    """Submit a batch script and return the job's number.

    Args:
        script: the batch script.
        site: a site.env, sourced first for the SBATCH_* variables that it sets.
        options: more options of sbatch.

    Raises:
        UserError: Slurm refuses the script. Nothing is queued then.
    """
    # A job that submits another job must not pass its own allocation on.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SRUN_"))}
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    sbatch = ["bash", "-c", SOURCE_SITE_THEN_SBATCH, str(site or "")]
    output = run_slurm(*sbatch, "--parsable", *options, str(script), environment=environment)
    job = output.splitlines()[-1].partition(";")[0]  # JOB, or JOB;CLUSTER
    if not job.isdecimal():
        raise UserError(f"sbatch printed no job number: {output!r}; look for the job with squeue")
    return job


def submit_dependent_script(jobs: Sequence[str], script: Path, site: Path | None, *options: str) -> str:
    """Submit a script that depends on jobs submitted before. If Slurm refuses it, those jobs are cancelled too.

    Raises:
        UserError: Slurm refuses the script.
    """
    try:
        return submit_script(script, site, *options)
    except UserError:
        run_slurm("scancel", *jobs)
        raise


def queued_jobs(jobs: Iterable[str]) -> list[QueuedJob]:
    """Return those of `jobs` that are pending or running; for an array, each of its tasks."""
    lines = run_slurm("squeue", "--me", "--all", "--noheader", "--array", "--format=%i|%T|%r|%N").splitlines()
    found = [QueuedJob(*line.split("|")) for line in lines]
    return [job for number in jobs for job in found if number in (job.job, job.job.partition("_")[0])]


def requeue_job(job: str, delay_seconds: float, exclude: Sequence[str]) -> None:
    """Requeue the job that this process runs in, not before a delay and not on the nodes `exclude`.

    Slurm then ends the batch script by SIGTERM, which is ignored here: the job is pending again by then and can still
    be changed while the script is alive.
    """
    changes = [f"StartTime=now+{delay_seconds:.0f}"] if delay_seconds else []
    if exclude:
        before = run_slurm("squeue", "--noheader", "--jobs", job, "--format=%x").replace("(null)", "")
        changes.append(f"ExcNodeList={','.join(filter(None, [before, *exclude]))}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also in the commands started from here on
    try:
        run_slurm("scontrol", "requeue", job)
    except UserError:  # the first answer was lost and the retry found the job requeued
        if [found.state for found in queued_jobs([job])] != ["PENDING"]:
            raise
    if changes:
        run_slurm("scontrol", "update", f"JobId={job}", *changes)
