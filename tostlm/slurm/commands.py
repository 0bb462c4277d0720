"""Slurm's own commands. What a command refuses becomes a UserError of one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.errors import UserError
from tostlm.slurm.history import SITE, SUBMITTED, JobHistory

COMMAND_TIMEOUT_SECONDS = 60
# How long a job retries while the controller does not answer, as during its restart.
RETRY_TIMEOUT_SECONDS, RETRY_INTERVAL_SECONDS = 1800, 10
CONTROLLER_DOWN = re.compile(
    "Unable to contact slurm controller|Socket timed out|Connection refused|Transport endpoint|Zero Bytes were"
    "|standby mode|temporarily unable"
)
ERROR_PREFIX = re.compile(r"^(sbatch|scontrol|squeue|scancel|slurm_\w+)?\s*(error|allocation failure)?:\s*")


class QueuedJob(NamedTuple):
    """A job that is pending or running. Each task of an array is a job of its own, ARRAY_INDEX."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it is pending
    nodes: str


def run_slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return what it prints; inside a job, retry while the controller does not answer.

    Raises:
        UserError: the command is not on this machine or refuses, or the controller does not answer.
    """
    # sbatch is never retried: the job may be queued although the answer was lost.
    retries = "SLURM_PROCID" in os.environ and command[0] != "sbatch"
    deadline = time.monotonic() + (RETRY_TIMEOUT_SECONDS if retries else 0)
    while True:
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, env=environment
            )
        except FileNotFoundError:
            raise UserError(
                f"{command[0]} is not on this machine; run this where Slurm's commands are, as on a login node"
            ) from None
        except subprocess.TimeoutExpired:
            problem = f"{command[0]} did not answer within {COMMAND_TIMEOUT_SECONDS} s"
        else:
            if result.returncode == 0:
                return result.stdout.strip()
            found = CONTROLLER_DOWN.search(result.stderr)
            if not found:
                lines = f"{result.stdout}\n{result.stderr}".splitlines()
                reasons = "; ".join(ERROR_PREFIX.sub("", line) for line in lines if line.strip())
                raise UserError(f"Slurm refuses: {reasons} (`{' '.join(command)}`)")
            problem = f"{command[0]}: {found[0]}"
        if time.monotonic() >= deadline:
            raise UserError(f"{problem}; try again when Slurm's controller is up")
        time.sleep(RETRY_INTERVAL_SECONDS)


def site_environment(site: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables after a site.env was sourced.

    Raises:
        UserError: site.env ends the shell that sources it.
    """
    command = ["bash", "-c", '. "$0" >&2; exec env -0', str(site)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        printed = " ".join(result.stderr.split()) or "it prints no reason"
        raise UserError(
            f"{site} ends bash with code {result.returncode} ({printed}); it may only set up the environment"
        )
    return dict(variable.split("=", 1) for variable in result.stdout.split("\0") if variable)


def submit_script(history: JobHistory, name: str, *options: str, **facts: object) -> str:
    """Submit a batch script of a run's folder with options of sbatch, record the job with `facts`, return its number.

    The folder's site.env is sourced first, for the SBATCH_* variables that it sets.

    Raises:
        UserError: Slurm refuses the script. Nothing is queued then.
    """
    # A job that submits another job must not pass its own allocation on.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key == "SLURM_CONF" or not key.startswith(("SLURM_", "SRUN_"))
    }
    environment = site_environment(history.folder / SITE, environment)
    output = run_slurm("sbatch", "--parsable", *options, str(history.folder / name), environment=environment)
    job = output.splitlines()[-1].partition(";")[0]  # JOB, or JOB;CLUSTER
    if not job.isdecimal():
        raise UserError(f"sbatch printed no job number: {output!r}; look for the job with squeue")
    history.add(SUBMITTED, job, **facts)
    return job


def submit_dependent_script(jobs: Sequence[str], history: JobHistory, name: str, *options: str, **facts: object) -> str:
    """Submit a script that depends on jobs submitted before. If Slurm refuses it, cancel those jobs and raise."""
    try:
        return submit_script(history, name, *options, **facts)
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
