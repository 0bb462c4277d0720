"""What a run's folder holds about its jobs.

run_dir/slurm/
  jobs.jsonl           one line per event: submitted, started, ended, message, cancelled
  pretrain.sbatch      the script that was submitted, and what it reads:
  config.yaml          the resolved config
  site.env             the cluster's settings, empty without any
  code.txt             version, git commit and changes, installed packages
  logs/JOB.log         output of the job and of rank 0; JOB-rank-N.log holds the output of rank N
  eval/, bench/, ...   the same of jobs that do not train
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, cast

from tostlm.checkpoint import checkpoints, step_of
from tostlm.errors import EXIT_LOST_RANK
from tostlm.files import append_json_line, read_json_lines

FOLDER, LOGS, JOBS = "slurm", "logs", "jobs.jsonl"
SCRIPT, CONFIG, SITE, CODE = "pretrain.sbatch", "config.yaml", "site.env", "code.txt"
SUBMITTED, STARTED, ENDED, MESSAGE, CANCELLED = "submitted", "started", "ended", "message", "cancelled"


class JobEvent(TypedDict):
    """A line of jobs.jsonl."""

    event: str
    job: str
    time: float
    step: NotRequired[int]  # started, ended: of the newest checkpoint
    nodes: NotRequired[str]  # started
    log: NotRequired[str]  # started: of the job and of rank 0
    exit_code: NotRequired[int]  # ended
    rank: NotRequired[int]  # ended: the first rank that failed
    exclude: NotRequired[list[str]]  # ended: nodes that the doctor found unhealthy
    text: NotRequired[str]  # message
    after: NotRequired[str]  # submitted: the job before it in its chain
    runs: NotRequired[list[str]]  # submitted: the folders of a sweep's runs, each a task of the array
    command: NotRequired[str]  # submitted: the subcommand of a job that does not train


class StartResult(NamedTuple):
    """How one start of a job ended."""

    exit_code: int  # of the first rank that failed, or 0
    step: int  # of the newest checkpoint at that time


class JobHistory:
    """The events of a run's jobs, in its folder `run_dir`/slurm; those of a `task`, such as eval, in one inside."""

    def __init__(self, run_dir: Path, task: str = "") -> None:
        self.run_dir, self.folder = run_dir, run_dir / FOLDER / task
        self.logs = self.folder / LOGS

    def add(self, event: str, job: str, **facts: object) -> None:
        """Append an event of a job with its time and the other keys of `JobEvent`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "job": job, "time": round(time.time(), 1), **facts}
        append_json_line(self.folder / JOBS, line)

    def events(self, job: str | None = None) -> list[JobEvent]:
        """Return all events, or those of one job, oldest first."""
        events, _ = read_json_lines(self.folder / JOBS)
        known = cast(list[JobEvent], [event for event in events if {"event", "job"} <= event.keys()])
        return [event for event in known if job in (None, event["job"])]

    def jobs(self) -> list[str]:
        """Return every job of the run, the oldest first."""
        return list(dict.fromkeys(event["job"] for event in self.events()))

    def array_runs(self) -> list[Path]:
        """Return the folders of the runs of a sweep, whose jobs are tasks of one array; [] for a single run."""
        return list(dict.fromkeys(Path(run) for event in self.events() for run in event.get("runs", ())))

    def start_results(self, job: str) -> list[StartResult]:
        """Return how the starts of a job, and of the jobs before it in its chain, ended, oldest first.

        A start without an end was cut off by its node and counts as a lost rank.
        """
        events = self.events()
        predecessors = {event["job"]: event["after"] for event in events if "after" in event}
        chain = {job}
        while job in predecessors:
            job = predecessors[job]
            chain.add(job)
        results: list[StartResult] = []
        running = False
        for event in events:
            if event["job"] not in chain or event["event"] not in (STARTED, ENDED):
                continue
            if event["event"] == ENDED or running:
                results.append(StartResult(event.get("exit_code", EXIT_LOST_RANK), event.get("step", 0)))
            running = event["event"] == STARTED
        return results

    def step(self) -> int:
        """Return the step of the run's newest checkpoint, 0 without one."""
        found = checkpoints(self.run_dir)
        return step_of(found[-1]) if found else 0
