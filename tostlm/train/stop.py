"""Requests to stop: a signal, or the time that a run was given."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what a launcher or Slurm sends before it takes the machine away


class StopRequest:
    """Whether this rank has been asked to stop. Ranks hear of it at different moments and have to agree on a step.

    The signals are caught from `__enter__` to `__exit__`.
    """

    def __init__(self, time_limit_minutes: float | None) -> None:
        self._deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self._signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    @property
    def made(self) -> bool:
        return self._signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """Why, in a few words, of a rank that was asked itself."""
        if self._signal is not None:
            return self._signal.name
        return "train.time_limit_minutes" if self.made else "another rank"
