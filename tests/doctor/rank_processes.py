"""Ranks of `tostlm doctor`, started one by one, so that a test can break one of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from tests.warm import Program
from tostlm.launch.local import rank_env


class DoctorRanks:
    """Ranks 0 to world_size - 1, each with its own host name; `failing_rank` calls the function `fault` first."""

    def __init__(
        self,
        *arguments: str,
        world_size: int = 2,
        only: int | None = None,
        failing_rank: int = -1,
        fault: Callable[[], object] | None = None,
    ) -> None:
        self.programs = {
            rank: Program(
                "doctor",
                *arguments,
                before=fault if rank == failing_rank else None,
                SLURMD_NODENAME=f"node{rank}",
                **variables,
            )
            for rank, variables in enumerate(rank_env(world_size))
            if only in (None, rank)
        }

    def __enter__(self) -> DoctorRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in self.programs.values():
            if program.running():
                program.send_signal(signal.SIGKILL)  # a stopped one too

    def wait_for(self, check: str) -> str:
        """Return rank 0's line for a check."""
        while True:
            over = not self.programs[0].running()
            for line in self.programs[0].stdout.splitlines():
                if line.split()[1:2] == [check]:
                    return line
            assert not over, f"no line for {check}: {self.programs[0].end()}"
            time.sleep(0.01)

    def end(self, rank: int = 0) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of a rank that ends by itself."""
        done = self.programs[rank].end(120)
        return done.returncode, done.stdout, done.stderr

    @contextmanager
    def slowed(self, rank: int, share: float) -> Iterator[None]:
        """Let a rank run only for `share` of the time, less than its share of busy cores."""
        program, over = self.programs[rank], threading.Event()

        def alternate() -> None:
            while not over.is_set():
                start = time.monotonic()
                program.send_signal(signal.SIGCONT)
                time.sleep(0.01)
                program.send_signal(signal.SIGSTOP)
                time.sleep((time.monotonic() - start) * (1 - share) / share)
            program.send_signal(signal.SIGCONT)

        thread = threading.Thread(target=alternate)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
