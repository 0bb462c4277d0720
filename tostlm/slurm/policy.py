"""Whether a job that ended is started again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from tostlm.errors import EXIT_BUG, EXIT_REQUEUE, EXIT_USER_ERROR
from tostlm.slurm.history import End

STARTS = {EXIT_REQUEUE: 3, EXIT_BUG: 2}  # that may end so before the run has saved a new step
STARTS_OF_LOST_RANKS = 6  # a rank that dies or hangs is most often its node's fault, and nodes come back
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 10, 600


class Decision(NamedTuple):
    """What becomes of a job, and why in a few words."""

    again: bool
    delay_seconds: float
    why: str


def decide(ends: Sequence[End]) -> Decision:
    """After the last of a job's ends."""
    code, step = ends[-1]
    if code == 0:
        return Decision(False, 0, "finished")
    if code == EXIT_USER_ERROR:
        return Decision(False, 0, "what its log says has to be mended first")
    here = list(takewhile(lambda end: end.step == step and end.code != 0, reversed(ends)))
    if code == EXIT_REQUEUE:
        here = list(takewhile(lambda end: end.code == EXIT_REQUEUE, here))
        what = "was stopped as asked"
    else:
        here = [end for end in here if (end.code == EXIT_BUG if code == EXIT_BUG else end.code != EXIT_REQUEUE)]
        what = "failed with a defect" if code == EXIT_BUG else "lost a rank"
    allowed = STARTS.get(code, STARTS_OF_LOST_RANKS)
    if len(here) >= allowed:
        return Decision(False, 0, f"it {what}, and none of its last {len(here)} starts came beyond step {step}")
    delay = 0 if len(here) == 1 else min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (len(here) - 2))
    return Decision(True, delay, f"it {what}, and goes on from step {step}")
