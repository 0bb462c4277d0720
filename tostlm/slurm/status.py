"""What became of a run's jobs, for a person."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tostlm.checkpoint import CONFIG, checkpoints
from tostlm.config import load_config
from tostlm.errors import EXIT_REQUEUE, UserError
from tostlm.slurm.commands import Queued, queued, slurm
from tostlm.slurm.history import CANCELLED, ENDED, SAID, STARTED, Event, JobHistory

TAIL_BYTES, TAIL_LINES = 1 << 16, 8


def status(run_dir: Path) -> str:
    """State, step, speed, time to go, restarts and newest checkpoint of a run, and why it last failed.

    Raises:
        UserError: no job of this run was ever submitted, or Slurm has no answer.
    """
    record = JobHistory(run_dir)
    events = record.events()
    if not events:
        raise UserError(f"{run_dir} has had no job; start one with `tostlm submit pretrain`")
    runs = [run for event in events for run in event.get("runs", ())]
    if runs:
        return "\n\n".join(status(Path(run)) for run in dict.fromkeys(runs))
    lines = {"run": str(run_dir), "job": _jobs(record, queued(record.jobs())), **_progress(run_dir)}
    failure = _failure(record, events)
    return "\n".join(f"{name:<12}{text}" for name, text in {**lines, **failure}.items())


def _jobs(record: JobHistory, alive: list[Queued]) -> str:
    def one(job: Queued) -> str:
        where = f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason != "None" else ""
        starts = sum(event["what"] == STARTED for event in record.events(job.job))
        restarts = f", restarted {_times(starts - 1)}" if starts > 1 else ""
        return f"{job.job} {job.state.lower()}{where}{restarts}"

    if alive:
        return "; ".join(map(one, alive))
    events = record.events()
    starts = sum(event["what"] == STARTED for event in events)
    said = [event["text"] for event in events if event["what"] == SAID]
    return (
        "none waits or runs"
        + (f", restarted {_times(starts - 1)}" if starts > 1 else "")
        + "".join(f"; {text}" for text in said[-1:])
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _progress(run_dir: Path) -> dict[str, str]:
    """From the last line that training wrote."""
    report = next((line for line in map(_parsed, reversed(_tail(run_dir / "metrics.jsonl"))) if line), None)
    found = checkpoints(run_dir)
    saved = {"checkpoint": str(found[-1])} if found else {}
    if report is None or not (run_dir / CONFIG).exists():
        return {"step": "none yet", **saved}
    train = load_config(run_dir / CONFIG).train
    step, speed = report["step"], report.get("tokens_per_second")
    text = f"{step:,} of {train.steps:,}"
    if speed:
        text += f", {speed:,.0f} tokens/s"
        if step < train.steps:
            text += f", {_duration((train.steps - step) * train.batch_tokens / speed)} to go"
    age = time.time() - report["time"]
    return {"step": f"{text}, said {_duration(age)} ago", **saved}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except ValueError:
        return None
    return report if report.get("kind") == "train" else None


def _failure(record: JobHistory, events: list[Event]) -> dict[str, str]:
    """The last words of the rank that ended badly, where the newest start did."""
    ended = next((event for event in reversed(events) if event["what"] in (ENDED, CANCELLED)), None)
    if ended is None or ended["what"] == CANCELLED or ended["code"] in (0, EXIT_REQUEUE):
        return {}
    rank = ended["rank"]
    job_log = next(event["log"] for event in reversed(events) if event["what"] == STARTED)
    log = record.logs / f"{ended['job']}-rank-{rank}.log" if rank else Path(job_log)
    words = "".join(f"\n  {line}" for line in _tail(log)[-TAIL_LINES:])
    excluded = f", excluded: {', '.join(ended['exclude'])}" if ended.get("exclude") else ""
    return {"failed": f"rank {rank} of job {ended['job']} with code {ended['code']}{excluded}; {log}:{words}"}


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cancel(run_dir: Path, now: bool) -> str:
    """End all jobs of a run; those that run save first, unless it has to be `now`. Returns what was done.

    Raises:
        UserError: none waits or runs.
    """
    runs = [Path(run) for event in JobHistory(run_dir).events() for run in event.get("runs", ())]
    told = []
    for folder in dict.fromkeys(runs) or [run_dir]:
        record = JobHistory(folder)
        for job in queued(record.jobs()):
            record.add(CANCELLED, job.job)
            saves = job.state == "RUNNING" and not now
            slurm("scancel", *(["--batch", "--signal=USR1"] if saves else []), job.job)
            told.append(f"job {job.job} {'saves and ends' if saves else 'is cancelled'}")
    if not told:
        raise UserError(f"{run_dir} has no job that waits or runs; see `tostlm submit status {run_dir}`")
    return "\n".join(told)
