"""How a run continues after one of its jobs ends, and whether a job that ended is started again."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import takewhile
from typing import NamedTuple

from tostlm.errors import EXIT_BUG, EXIT_REQUEUE, EXIT_USER_ERROR
from tostlm.slurm.history import StartResult

# Starts in a row that may end with this code before the run has saved a new step.
MAX_STARTS = {EXIT_REQUEUE: 3, EXIT_BUG: 2}
MAX_STARTS_LOST_RANK = 6  # a rank that dies or hangs is most often its node's fault, and nodes come back
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 10, 600


class OnStop(StrEnum):
    """What follows a job that was asked to stop, as Slurm asks before the time limit."""

    REQUEUE = "requeue"  # the same job starts again
    END = "end"  # the jobs that wait for it start
    SUCCESSOR = "successor"  # the job that it queued when it started starts


class RestartPolicy(NamedTuple):
    """How a pretraining job continues, and what it does before training."""

    chain: int = 1  # jobs in a row, each with its own time limit
    until_done: bool = False  # each job queues the next one
    doctor: bool = False  # check the nodes first, and restart without those that fail
    warning_seconds: int = 120  # how long before its time limit a job is asked to stop

    @property
    def on_stop(self) -> OnStop:
        if self.until_done:
            return OnStop.SUCCESSOR
        return OnStop.END if self.chain > 1 else OnStop.REQUEUE


class RestartDecision(NamedTuple):
    """Whether a job starts again, after which delay, and the reason in a few words."""

    restart: bool
    delay_seconds: float
    reason: str


def decide_restart(results: Sequence[StartResult]) -> RestartDecision:
    """Decide after the last of a job's starts; `results` says how each of them ended, oldest first."""
    code, step = results[-1]
    if code == 0:
        return RestartDecision(False, 0, "finished")
    if code == EXIT_USER_ERROR:
        return RestartDecision(False, 0, "what its log reports has to be fixed first")
    # Only starts since the last progress count, and of them those that ended for the same reason.
    stuck = list(takewhile(lambda end: end.step == step and end.exit_code != 0, reversed(results)))
    if code == EXIT_REQUEUE:
        stuck = list(takewhile(lambda end: end.exit_code == EXIT_REQUEUE, stuck))
        cause = "was asked to stop"
    elif code == EXIT_BUG:
        stuck = [end for end in stuck if end.exit_code == EXIT_BUG]
        cause = "failed with a bug"
    else:
        stuck = [end for end in stuck if end.exit_code != EXIT_REQUEUE]
        cause = "lost a rank"
    if len(stuck) >= MAX_STARTS.get(code, MAX_STARTS_LOST_RANK):
        reason = f"it {cause}, and none of its last {len(stuck)} starts got beyond step {step}"
        return RestartDecision(False, 0, reason)
    delay = 0 if len(stuck) == 1 else min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (len(stuck) - 2))
    return RestartDecision(True, delay, f"it {cause}, and continues from step {step}")
