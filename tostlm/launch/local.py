"""Processes of one run on this machine."""

from __future__ import annotations

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

    When one rank fails the others are ended: they would wait for it for ever.
    """
    children = [
        subprocess.Popen([sys.executable, "-m", "tostlm", *arguments], env=environment)
        for environment in _environments(processes)
    ]
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code]
            if failed:
                return failed[0] if failed[0] > 0 else 128 - failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_SECONDS)
    finally:
        _end(children)


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
