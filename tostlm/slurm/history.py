"""What is kept in a run's folder of its jobs.

run_dir/slurm/
  jobs.jsonl           a line an event: submitted, started, ended, said, cancelled
  pretrain.sbatch      the script that was submitted, and what it reads:
  config.yaml          the resolved config
  site.env
  code.txt             version, git commit and changes, installed packages
  logs/JOB.log         what the job and rank 0 said; JOB-rank-N.log what rank N said
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tostlm.checkpoint import checkpoints, step_of
from tostlm.errors import EXIT_LOST_RANK

FOLDER, LOGS, JOBS = "slurm", "logs", "jobs.jsonl"
SCRIPT, CONFIG, SITE, CODE = "pretrain.sbatch", "config.yaml", "site.env", "code.txt"
SUBMITTED, STARTED, ENDED, SAID, CANCELLED = "submitted", "started", "ended", "said", "cancelled"
Event = dict[str, Any]


class End(NamedTuple):
    """How one start of a job ended."""

    code: int  # of the first rank that ended badly
    step: int  # of the newest checkpoint by then


class JobHistory:
    """The events of a run's jobs."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.folder = run_dir, run_dir / FOLDER
        self.logs = self.folder / LOGS

    def add(self, what: str, job: str, **facts: object) -> None:
        """Write an event down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / JOBS).open("a") as file:
            file.write(json.dumps({"what": what, "job": job, "time": round(time.time(), 1), **facts}) + "\n")

    def events(self, job: str | None = None) -> list[Event]:
        """All of them, or those of a job, oldest first."""
        return [event for event in self._read() if job in (None, event["job"])]

    def _read(self) -> Iterator[Event]:
        file = self.folder / JOBS
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:  # torn, as a machine that lost power left it
                continue

    def jobs(self) -> list[str]:
        """Every job of the run, the oldest first."""
        return list(dict.fromkeys(event["job"] for event in self._read()))

    def ends(self, job: str) -> list[End]:
        """How the starts of a job, and of those before it in its chain, ended; a lost node let one say nothing."""
        line = self._line(job)
        ends: list[End] = []
        begun = False
        for event in self._read():
            if event["job"] not in line:
                continue
            if event["what"] == STARTED:
                if begun:
                    ends.append(End(EXIT_LOST_RANK, event["step"]))
                begun = True
            elif event["what"] == ENDED:
                ends.append(End(event["code"], event["step"]))
                begun = False
        return ends

    def _line(self, job: str) -> set[str]:
        """A job and those before it in its chain."""
        before = {event["job"]: event["after"] for event in self._read() if event.get("after")}
        line = {job}
        while job in before:
            job = before[job]
            line.add(job)
        return line

    def step(self) -> int:
        """Of the newest checkpoint."""
        found = checkpoints(self.run_dir)
        return step_of(found[-1]) if found else 0
