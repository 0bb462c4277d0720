"""Job steps: tostlm as one Slurm task a rank, and how it ended."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NamedTuple

from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE, EXIT_USER_ERROR
from tostlm.launch import EXIT_REPORT
from tostlm.slurm.history import JobHistory

# Rank 0 speaks for the job; the others have a file each. exec leaves signals to tostlm itself.
RANK = '[ "$SLURM_PROCID" = 0 ] || exec >>"$TOSTLM_LOG-rank-$SLURM_PROCID.log" 2>&1; exec tostlm "$@"'
NOT_STARTED = (EXIT_USER_ERROR, 126, 127)  # a shell's codes of a command that it cannot run, or not find


class StepExit(NamedTuple):
    """How a step ended."""

    code: int  # of the first rank to end badly
    rank: int = 0
    exclude: Sequence[str] = ()  # nodes that the doctor wants left out


class Steps:
    """The steps of a job, one after another. Requests to stop are handed on to the ranks as SIGUSR1."""

    def __init__(self, record: JobHistory, job: str, layout: Sequence[str]) -> None:
        self._record, self._job, self._layout = record, job, layout
        self._asked = False
        self._running: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._running is not None:
            self._running.send_signal(signal.SIGUSR1)

    def train(self, arguments: Sequence[str]) -> StepExit:
        """Run `tostlm train` on all ranks."""
        return self._run("train", *arguments)

    def examine(self, arguments: Sequence[str]) -> StepExit:
        """Run `tostlm doctor` on all ranks; unfit nodes are a lost rank's, all else it complains of is the user's."""
        file = self._record.folder / f"doctor-{self._job}.json"
        file.unlink(missing_ok=True)
        ended = self._run("doctor", *arguments, "--out", str(file))
        if ended.code != EXIT_USER_ERROR:
            return ended
        if not file.exists():  # the ranks never met
            return StepExit(EXIT_LOST_RANK, ended.rank)
        exclude = [host for host in json.loads(file.read_text())["exclude"] if host]
        return StepExit(EXIT_LOST_RANK if exclude else EXIT_USER_ERROR, ended.rank, exclude)

    def _run(self, *arguments: str) -> StepExit:
        if self._asked:
            return StepExit(EXIT_REQUEUE)
        outcome = (self._record.folder / f"outcome-{self._job}").absolute()
        outcome.unlink(missing_ok=True)
        log = (self._record.logs / self._job).absolute()
        environment = {**os.environ, EXIT_REPORT: str(outcome), "TOSTLM_LOG": str(log)}
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # which srun does not take from sbatch by itself
            environment = {"OMP_NUM_THREADS": cores, **environment, "SRUN_CPUS_PER_TASK": cores}
        options = ["--kill-on-bad-exit=1", *self._layout, *shlex.split(os.environ.get("TOSTLM_SRUN", ""))]
        command = ["srun", *options, "bash", "-c", RANK, "tostlm", *arguments]
        self._running = subprocess.Popen(command, env=environment)
        code = self._running.wait()
        list(outcome.parent.iterdir())  # a network file system may remember that there was none
        with suppress(FileNotFoundError, ValueError):
            rank, code = map(int, outcome.read_text().split())
            outcome.unlink()
            return StepExit(code, rank)
        if code == 0:
            return StepExit(0)
        # No rank could say how it ended: all were killed, or srun could not start them.
        return StepExit(EXIT_USER_ERROR if code in NOT_STARTED else EXIT_REQUEUE if self._asked else EXIT_LOST_RANK)
