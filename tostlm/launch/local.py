"""Processes of one run on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0


def run_local(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m tostlm ARGUMENTS` once a rank; returns the exit code of the first that failed, or 0.

    When one rank fails, or this process is asked to end, the others are ended: they would wait for ever.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tostlm", *arguments], env=environment, preexec_fn=_end_with_the_launcher
        )
        for environment in _environments(processes)
    ]
    try:
        while True:
            codes = [child.poll() for child in children]
            if any(codes):
                time.sleep(POLL_SECONDS)  # a rank that ends takes others with it: hear of the first
                return _verdict([child.poll() for child in children])
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_SECONDS)
    finally:
        _end(children)


def _verdict(codes: Sequence[int | None]) -> int:
    """The exit code of a run: of a signal, else of a user's mistake, else of what else went wrong."""
    rank, code = min(
        ((rank, code) for rank, code in enumerate(codes) if code), key=lambda ended: (ended[1] > 0, ended[1] != 2)
    )
    if code > 0:
        return code
    print(f"tostlm: rank {rank} was ended by signal {-code}", file=sys.stderr)
    return 128 - code


def _end_with_the_launcher() -> None:
    """Have Linux end this rank when its launcher is killed, which then cannot do so itself."""
    PR_SET_PDEATHSIG = 1  # prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _environments(processes: int) -> list[dict[str, str]]:
    port = _free_port()
    threads = max(1, (os.cpu_count() or 1) // processes)
    return [
        {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(processes)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
