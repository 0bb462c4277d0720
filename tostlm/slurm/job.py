"""What a Slurm job's batch script does: starts the ranks, hands signals on, and sees to what comes after."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType

from tostlm.config import load_config
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE, UserError
from tostlm.files import require_writable
from tostlm.launch import OUTCOME
from tostlm.slurm.commands import queued, requeue, slurm, submit_script
from tostlm.slurm.policy import USERS_MISTAKE, decide
from tostlm.slurm.record import CANCELLED, ENDED, SCRIPT, SITE, STARTED, SUBMITTED, Record

# Rank 0 speaks for the job; the others have a file each. exec leaves signals to tostlm itself.
RANK = '[ "$SLURM_PROCID" = 0 ] || exec >>"$TOSTLM_LOG-rank-$SLURM_PROCID.log" 2>&1; exec tostlm "$@"'


class Then(StrEnum):
    """What follows a job that was asked to stop, as Slurm does before the time limit."""

    REQUEUE = "requeue"  # the same job, again
    END = "end"  # those that wait for it
    SUCCESSOR = "successor"  # the job that it has queued when it started


class Asked:
    """Requests to stop, which are handed on to the ranks as SIGUSR1."""

    def __init__(self) -> None:
        self.made = False
        self.step: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        if self.step is not None:
            self.step.send_signal(signal.SIGUSR1)


def run_job(config_file: Path, overrides: Sequence[str], then: Then, doctor: bool) -> int:
    """Train until the run is finished or its job has to end; returns the job's exit code.

    Raises:
        UserError: this is no job, its config is wrong, its folder cannot be written, or Slurm refuses to go on.
    """
    job = _this_job()
    config = load_config(config_file, overrides)
    record = Record(config.run_dir)
    require_writable(record.logs)
    asked = Asked()
    if record.step() >= config.train.steps:
        print(f"{config.run_dir}: finished at step {record.step()}; raise train.steps to go on", flush=True)
        _cancel_waiting(record, job)
        return 0
    record.add(STARTED, job, step=record.step(), nodes=os.environ.get("SLURM_JOB_NODELIST", ""))
    if then is Then.SUCCESSOR and not _waiting(record, job):
        _queue_successor(record)

    arguments = [str(config_file), *overrides]
    code, rank, exclude = _examine(arguments, record, job, asked) if doctor else (0, 0, [])
    if code == 0:
        code, rank = _step(["train", *arguments], record, job, asked)
    record.add(ENDED, job, code=code, rank=rank, step=record.step(), exclude=exclude)
    return _afterwards(record, job, code, then, exclude)


def _this_job() -> str:
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("this is no Slurm job; submit one: `tostlm submit pretrain`, or sbatch slurm/pretrain.sbatch")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _step(arguments: Sequence[str], record: Record, job: str, asked: Asked) -> tuple[int, int]:
    """Run tostlm as one task a rank; returns the exit code and the number of the first rank that ended badly."""
    outcome = (record.folder / f"outcome-{job}").absolute()
    outcome.unlink(missing_ok=True)
    environment = {**os.environ, OUTCOME: str(outcome), "TOSTLM_LOG": str((record.logs / job).absolute())}
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # which srun does not take from sbatch by itself
        environment = {"OMP_NUM_THREADS": cores, **environment, "SRUN_CPUS_PER_TASK": cores}
    options = shlex.split(os.environ.get("TOSTLM_SRUN", ""))
    command = ["srun", "--kill-on-bad-exit=1", *options, "bash", "-c", RANK, "tostlm", *arguments]
    asked.step = subprocess.Popen(command, env=environment)
    if asked.made:
        asked.step.send_signal(signal.SIGUSR1)
    code = asked.step.wait()
    if not outcome.exists():  # none of them could say how it ended
        killed = code < 0 or code >= 128
        return (EXIT_REQUEUE if asked.made else EXIT_LOST_RANK) if killed else code, 0
    rank, code = map(int, outcome.read_text().split())
    outcome.unlink()
    return code, rank


def _examine(arguments: Sequence[str], record: Record, job: str, asked: Asked) -> tuple[int, int, list[str]]:
    """Run the doctor on all ranks: as `_step`, and the nodes it wants excluded."""
    findings = record.folder / f"doctor-{job}.json"
    findings.unlink(missing_ok=True)
    code, rank = _step(["doctor", *arguments, "--out", str(findings)], record, job, asked)
    exclude = json.loads(findings.read_text())["exclude"] if findings.exists() else []
    return EXIT_LOST_RANK if code == USERS_MISTAKE and exclude else code, rank, exclude


def _afterwards(record: Record, job: str, code: int, then: Then, exclude: list[str]) -> int:
    """See to what comes after a start of the job that ended with `code`."""
    decision = decide(record.ends(job))
    if any(event["what"] == CANCELLED for event in record.events(job)) or _state(job) != "RUNNING":
        _say(f"job {job} was cancelled and is not started again")
        return 0
    if not decision.again:
        _cancel_waiting(record, job)
        if code:
            _say(f"job {job} is not started again: {decision.why}")
        return code
    if code == EXIT_REQUEUE and then is not Then.REQUEUE:
        _say(f"job {job} ends: {decision.why}" + "".join(f" as job {other}" for other in _waiting(record, job)[:1]))
        return 0
    later = f" in {decision.delay_seconds:.0f} s" if decision.delay_seconds else ""
    without = f" without {', '.join(exclude)}" if exclude else ""
    _say(f"job {job} is started again{later}{without}: {decision.why}")
    requeue(job, decision.delay_seconds, exclude)
    return 0


def _say(line: str) -> None:
    print(f"tostlm: {line}", flush=True)


def _state(job: str) -> str:
    """A job that is being cancelled is COMPLETING while its batch script still runs; to requeue it would undo that."""
    return next((found.state for found in queued([job])), "")


def _waiting(record: Record, job: str) -> list[str]:
    return [other.job for other in queued(record.jobs()) if other.job != job and other.state == "PENDING"]


def _cancel_waiting(record: Record, job: str) -> None:
    if waiting := _waiting(record, job):
        slurm("scancel", *waiting)
        _say(f"cancelled what waited for it: job {', '.join(waiting)}")


def _queue_successor(record: Record) -> None:
    script, site = record.folder / SCRIPT, record.folder / SITE
    if not script.exists():
        raise UserError(f"{script} is missing, which a successor would run; use `tostlm submit pretrain --until-done`")
    successor = submit_script(script, site if site.exists() else None, "--dependency=singleton")
    record.add(SUBMITTED, successor)
