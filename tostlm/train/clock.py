"""Where a run's time goes."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

OTHER = "other"  # what is in no phase


class PhaseTimers:
    """Splits the time between reports into phases: all of it, and none of it twice.

    A phase inside another interrupts it. On a GPU the moments are events in its stream, read once they have passed, so
    that a phase is as long as the GPU is at it and nothing waits before a report.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._phases = [OTHER]
        self._marks = deque([(OTHER, self._now())])  # moments not yet counted, and the phase that ended at each
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}  # seconds that each phase took when it last came, as of the last report

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside as `name`, which a trace calls it too."""
        self._mark()
        self._phases.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._mark()
            self._phases.pop()

    def report(self) -> dict[str, float]:
        """Seconds of each phase since the last report; on a GPU it waits for what was asked of it."""
        self._mark()
        self._marks[-1][1].synchronize()
        self._count()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)

    def _mark(self) -> None:
        self._marks.append((self._phases[-1], self._now()))
        self._count()

    def _now(self) -> Any:
        moment = torch.cuda.Event(enable_timing=True) if self._on_cuda else CpuEvent()
        moment.record()
        return moment

    def _count(self) -> None:
        """Count what has passed, so that no long row of events builds up between reports."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            (_, start), (name, end) = self._marks.popleft(), self._marks[0]
            self.last[name] = start.elapsed_time(end) / 1000
            self._seconds[name] += self.last[name]


class CpuEvent:
    """A moment of the processor, in the words of `torch.cuda.Event`."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: CpuEvent) -> float:
        return 1000 * (end._seconds - self._seconds)
