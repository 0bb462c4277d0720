"""Running the ranks of a run on this machine: signals are forwarded to them, their exit codes become one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from subprocess import Popen, TimeoutExpired
from types import FrameType

from tostlm.errors import EXIT_LOST_RANK, EXIT_LOST_UNNAMED, EXIT_REQUEUE, EXIT_USER_ERROR, report

LAUNCHED = "TOSTLM_LAUNCHED"  # environment variable of the ranks
LOST = (EXIT_LOST_RANK, EXIT_LOST_UNNAMED)
POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0  # for ranks that have lost another rank to name it


def run_local(arguments: Sequence[str], processes: int, received: list[int] | None = None) -> int:
    """Run `python -m tostlm ARGUMENTS` once per rank and return the exit code of the run.

    SIGTERM and SIGUSR1 are forwarded to the ranks, which save and exit: EXIT_REQUEUE. A second SIGTERM, SIGHUP and
    SIGINT end them at once. When one rank fails the others are ended, as they would wait for it for ever.

    The signals that were forwarded are added to `received`: ranks at their end may still succeed after one.
    """
    children: list[Popen[bytes]] = []
    received = [] if received is None else received

    def forward(number: int, frame: FrameType | None) -> None:
        if received.count(signal.SIGTERM) and number == signal.SIGTERM:
            end_at_once(number, frame)
        received.append(number)
        for child in children:
            child.send_signal(number)

    def end_at_once(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.kill()
        sys.exit(128 + number)

    with contextlib.ExitStack() as at_exit:
        at_exit.callback(_end_all, children)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        for variables in rank_env(processes):
            command = [sys.executable, "-m", "tostlm", *arguments]
            environment = {**threads, **os.environ, **variables, LAUNCHED: "1"}
            children.append(Popen(command, env=environment, preexec_fn=end_with_parent))
        for number, handler in ((signal.SIGTERM, forward), (signal.SIGUSR1, forward), (signal.SIGHUP, end_at_once)):
            at_exit.callback(signal.signal, number, signal.signal(number, handler))
        return _wait(children, received)


def _wait(children: Sequence[Popen[bytes]], received: Sequence[int]) -> int:
    """Wait until all ranks have succeeded or one has failed, and return the exit code of the run.

    Of several failures a signal's counts before a user error's before a bug's. A code of `LOST` counts only if no rank
    has another code: those ranks merely lost the one that failed. `received` holds the signals that were forwarded.
    """
    while any(child.poll() is None for child in children) and not _failures(children):
        time.sleep(POLL_SECONDS)
    if not _failures(children):
        return max(child.returncode for child in children)
    time.sleep(POLL_SECONDS)  # a failing rank takes others with it: see all of the first ones
    first = _failures(children)
    _end_all(children)
    code, rank = min(first, key=lambda ended: (ended[0] > 0, ended[0] != EXIT_USER_ERROR, ended[0] in LOST))
    if code == EXIT_LOST_UNNAMED:
        report(f"rank {rank} lost another rank while the run started; run the same command to continue")
        return EXIT_LOST_RANK
    if code > 0:
        return code
    if -code in received:  # before training handles the signal, when there is nothing to save
        return EXIT_REQUEUE
    if all(child.returncode != EXIT_LOST_RANK for child in children):  # otherwise one has named the lost rank and host
        report(f"rank {rank} was ended by signal {-code}; run the same command to continue")
    return EXIT_LOST_RANK


def _failures(children: Sequence[Popen[bytes]]) -> list[tuple[int, int]]:
    """Return the exit code and the rank of each rank that has failed so far."""
    codes = ((child.poll(), rank) for rank, child in enumerate(children))
    return [(code, rank) for code, rank in codes if code not in (None, 0, EXIT_REQUEUE)]


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent dies, even if the parent is killed."""
    PR_SET_PDEATHSIG = 1  # prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def rank_env(processes: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank of a run on this machine, with a free rendezvous port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _end_all(children: Sequence[Popen[bytes]]) -> None:
    """Wait until the ranks end by themselves, then kill those that are stuck. SIGTERM would only ask them to save."""
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            child.kill()
            child.wait()
