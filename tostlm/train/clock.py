"""Where a run's time goes."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

OTHER = "other"  # what is in no phase
Mark = float | torch.cuda.Event  # a moment of the processor, or of the GPU's stream


class Clock:
    """Splits the time between reports into phases: all of it, and none of it twice.

    A phase inside another interrupts it. On a GPU the moments are events in its stream, read once they have passed, so
    that a phase is as long as the GPU is at it and nothing waits before a report.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._phases = [OTHER]
        self._marks: deque[tuple[str, Mark]] = deque([(OTHER, self._now())])  # and the phase that ends there
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
        last = self._marks[-1][1]
        if not isinstance(last, float):
            last.synchronize()
        self._settle()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)

    def _now(self) -> Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self) -> None:
        self._marks.append((self._phases[-1], self._now()))
        self._settle()

    def _settle(self) -> None:
        """Count what has passed, so that no long row of events builds up between reports."""
        while len(self._marks) > 1 and _has_passed(self._marks[1][1]):
            (_, start), (name, end) = self._marks.popleft(), self._marks[0]
            self.last[name] = _seconds_between(start, end)
            self._seconds[name] += self.last[name]


def _has_passed(mark: Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def _seconds_between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1000
