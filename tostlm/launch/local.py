"""Processes of one run on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from subprocess import Popen, TimeoutExpired
from types import FrameType

from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE, EXIT_USER_ERROR

POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0  # in which ranks that have lost one name it

Children = Sequence["Popen[bytes]"]
Codes = Sequence[int | None]


def run_local(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m tostlm ARGUMENTS` once a rank; returns the exit code of the run.

    SIGTERM and SIGUSR1 are handed on to the ranks and waited for: EXIT_REQUEUE when they have ended. A second SIGTERM,
    a SIGHUP or a SIGINT ends them at once. When one rank fails the others are ended: they would wait for ever.
    """
    children: list[Popen[bytes]] = []
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if asked.count(signal.SIGTERM) and number == signal.SIGTERM:
            end_at_once(number, frame)
        asked.append(number)
        for child in children:
            child.send_signal(number)

    def end_at_once(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.kill()
        sys.exit(128 + number)

    try:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        for place in rank_env(processes):
            command = [sys.executable, "-m", "tostlm", *arguments]
            environment = {**threads, **os.environ, **place}
            children.append(Popen(command, env=environment, preexec_fn=end_with_the_parent))
        with _handled({signal.SIGTERM: hand_on, signal.SIGUSR1: hand_on, signal.SIGHUP: end_at_once}):
            return _wait(children, asked)
    finally:
        _end(children)


@contextlib.contextmanager
def _handled(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Children, asked: Sequence[int]) -> int:
    """Until all ranks have ended well or one has not; returns the exit code of the run."""
    while True:
        codes = [child.poll() for child in children]
        if any(map(_failed, codes)):
            time.sleep(POLL_SECONDS)  # a rank that ends takes others with it: hear of the first
            first = [child.poll() for child in children]
            _end(children)
            return _verdict(first, [child.returncode for child in children], asked)
        if None not in codes:
            return max(code or 0 for code in codes)
        time.sleep(POLL_SECONDS)


def _failed(code: int | None) -> bool:
    return code not in (None, 0, EXIT_REQUEUE)


def _verdict(first: Codes, last: Codes, asked: Sequence[int]) -> int:
    """The exit code of a run whose `first` ranks failed: of a signal, else of a user's mistake, else of a defect.

    The others lost a rank then, and so EXIT_LOST_RANK is the code of a run whose first have no other.
    """
    rank, code = min(
        ((rank, code) for rank, code in enumerate(first) if code and _failed(code)),
        key=lambda ended: (ended[1] > 0, ended[1] != EXIT_USER_ERROR, ended[1] == EXIT_LOST_RANK),
    )
    if code > 0:
        return code
    if -code in asked:  # before training, where there is nothing to save
        return EXIT_REQUEUE
    if EXIT_LOST_RANK not in last:  # else the rank is named already, and where it was
        print(f"tostlm: rank {rank} was ended by signal {-code}; the same command goes on", file=sys.stderr)
    return EXIT_LOST_RANK


def end_with_the_parent(number: int = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when the one that started it is killed, which then cannot do so itself."""
    PR_SET_PDEATHSIG = 1  # prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def rank_env(processes: int) -> list[dict[str, str]]:
    """The environments that tell ranks on this machine who they are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _end(children: Children) -> None:
    """Ranks end by themselves when the first has, but for those that are stuck; a mere SIGTERM asks them to save."""
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            child.kill()
            child.wait()
