"""Status and cancellation of a run's jobs, for a person."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from tostlm.checkpoint import CONFIG, checkpoints
from tostlm.config import load_config
from tostlm.errors import EXIT_REQUEUE, UserError
from tostlm.files import read_json_object
from tostlm.slurm.commands import QueuedJob, queued_jobs, run_slurm
from tostlm.slurm.history import CANCELLED, ENDED, MESSAGE, STARTED, JobEvent, JobHistory

TAIL_BYTES, TAIL_LINES = 1 << 16, 8


def run_status(run_dir: Path) -> str:
    """Return a run's state, step, speed, remaining time, restarts and newest checkpoint, and why it last failed.

    Raises:
        UserError: no job of this run was ever submitted, or Slurm does not answer.
    """
    history = JobHistory(run_dir)
    events = history.events()
    if not events:
        raise UserError(f"{run_dir} has had no job; start one with `tostlm submit pretrain`")
    if runs := history.array_runs():
        return "\n\n".join(map(run_status, runs))
    lines = {"run": str(run_dir), "job": _job_line(history, events), **_progress(run_dir), **_failure(history, events)}
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _job_line(history: JobHistory, events: list[JobEvent]) -> str:
    if queued := queued_jobs(history.jobs()):
        return "; ".join(_describe_queued(history, job) for job in queued)
    messages = [event["text"] for event in events if event["event"] == MESSAGE]
    return "none is queued or running" + _restarts(events) + "".join(f"; {text}" for text in messages[-1:])


def _describe_queued(history: JobHistory, job: QueuedJob) -> str:
    where = f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason != "None" else ""
    return f"{job.job} {job.state.lower()}{where}{_restarts(history.events(job.job))}"


def _restarts(events: list[JobEvent]) -> str:
    restarts = sum(event["event"] == STARTED for event in events) - 1
    if restarts < 1:
        return ""
    return ", restarted once" if restarts == 1 else f", restarted {restarts} times"


def _progress(run_dir: Path) -> dict[str, str]:
    """Return step, speed and remaining time of the last line that training logged, and the newest checkpoint."""
    report = None
    for line in _tail(run_dir / "metrics.jsonl"):
        metrics = read_json_object(line)  # None of half a line
        if metrics is not None and metrics.get("kind") == "train":
            report = metrics
    found = checkpoints(run_dir)
    saved = {"checkpoint": str(found[-1])} if found else {}
    if report is None or not (run_dir / CONFIG).exists():
        return {"step": "none yet", **saved}
    config = load_config(run_dir / CONFIG)
    step, speed = report["step"], report.get("tokens_per_second")
    text = f"{step:,} of {config.train.steps:,}"
    if speed:
        text += f", {speed:,.0f} tokens/s"
        if step < config.train.steps:
            text += f", {_format_duration((config.tokens - config.tokens_after(step)) / speed)} to go"
    return {"step": f"{text}, logged {_format_duration(time.time() - report['time'])} ago", **saved}


def _failure(history: JobHistory, events: list[JobEvent]) -> dict[str, str]:
    """Return the last lines of the rank that failed, if the newest start did."""
    end = next((event for event in reversed(events) if event["event"] in (ENDED, CANCELLED)), None)
    if end is None or end["event"] == CANCELLED or end["exit_code"] in (0, EXIT_REQUEUE):
        return {}
    rank = end["rank"]
    job_log = next(event["log"] for event in reversed(events) if event["event"] == STARTED)
    log = history.logs / f"{end['job']}-rank-{rank}.log" if rank else Path(job_log)
    lines = "".join(f"\n  {line}" for line in _tail(log)[-TAIL_LINES:])
    excluded = f", excluded: {', '.join(end['exclude'])}" if end.get("exclude") else ""
    return {"failed": f"rank {rank} of job {end['job']} with exit code {end['exit_code']}{excluded}; {log}:{lines}"}


def _tail(path: Path) -> list[str]:
    with suppress(FileNotFoundError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()
    return []


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cancel_jobs(run_dir: Path, now: bool) -> str:
    """End all jobs of a run or of a sweep for good, and return what was done. Unless `now`, running jobs save first.

    Raises:
        UserError: none is queued or running.
    """
    lines = []
    for folder in JobHistory(run_dir).array_runs() or [run_dir]:
        history = JobHistory(folder)
        for job in queued_jobs(history.jobs()):
            history.add(CANCELLED, job.job)
            saves = job.state == "RUNNING" and not now
            run_slurm("scancel", *(["--batch", "--signal=USR1"] if saves else []), job.job)
            lines.append(f"job {job.job} {'saves and ends' if saves else 'is cancelled'}")
    if not lines:
        raise UserError(f"{run_dir} has no queued or running job; see `tostlm submit status {run_dir}`")
    return "\n".join(lines)
