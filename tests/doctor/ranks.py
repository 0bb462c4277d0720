"""The ranks of a doctor, started one by one, so that a test can do harm to one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

START = "import sys; sys.argv[0] = 'tostlm'; from tostlm.main import main; main()"


class Ranks:
    """Ranks 0 to world - 1, each on a host of its own by name; in rank `sick` the script `how` runs first."""

    def __init__(self, *arguments: str, world: int = 2, only: int | None = None, sick: int = -1, how: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        environment = {**os.environ, **rendezvous, "OMP_NUM_THREADS": "1"}
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, "-c", (how if rank == sick else "") + START, "doctor", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
            )
            for rank in range(world)
            if only in (None, rank)
        }
        self.printed: list[str] = []  # by rank 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.kill()  # a stopped one too
            process.communicate()

    def wait_for(self, check: str) -> str:
        """Rank 0's line on a check."""
        for line in self.processes[0].stdout:
            self.printed.append(line)
            if line.split()[1] == check:
                return line
        raise AssertionError(f"no line on {check}: {self.printed} {self.processes[0].stderr.read()}")

    def end(self, rank: int = 0) -> tuple[int, str, str]:
        """Exit code, all of stdout, stderr of a rank that ends by itself."""
        stdout, stderr = self.processes[rank].communicate(timeout=120)
        return self.processes[rank].returncode, "".join(self.printed) + stdout, stderr

    @contextmanager
    def slowed(self, rank: int, share: float) -> Iterator[None]:
        """A rank that runs for `share` of the time, less than it would get of cores that others want too."""
        process, over = self.processes[rank], threading.Event()

        def alternate() -> None:
            while not over.is_set():
                start = time.monotonic()
                process.send_signal(signal.SIGCONT)
                time.sleep(0.01)
                process.send_signal(signal.SIGSTOP)
                time.sleep((time.monotonic() - start) * (1 - share) / share)
            process.send_signal(signal.SIGCONT)

        thread = threading.Thread(target=alternate)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
