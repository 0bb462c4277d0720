"""The progress of a preparation, as it is printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

LINE_SECONDS = 60  # between two lines of progress if there is no terminal


class WorkDone(NamedTuple):
    """What was done since the last report."""

    source_bytes: int = 0  # as they are on disk
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class ProgressBar:
    """A bar on a terminal, a line a minute elsewhere: documents, tokens, MB of text per second, the time left.

    Args:
        sizes: bytes on disk of the work units to do; None for one whose size is unknown.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._done = WorkDone()
        self._start = self._last_line = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, unit="B", unit_scale=True, desc="prepare", disable=not self._terminal)

    def add(self, work: WorkDone) -> None:
        """Count what a worker did."""
        self._done = WorkDone(*(a + b for a, b in zip(self._done, work, strict=True)))
        if self._terminal:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(work.source_bytes)
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            print(f"prepare: {self._rates()}{self._time_left()}", flush=True)

    def close(self) -> None:
        """Print the rates of the whole work."""
        self._bar.close()
        if self._done.documents:
            print(f"prepare: {self._rates()}", flush=True)

    def _rates(self) -> str:
        seconds = time.monotonic() - self._start
        speed = self._done.text_bytes / seconds / 1e6
        return f"{self._done.documents:,} documents, {self._done.tokens:,} tokens, {speed:.1f} MB/s, {seconds:.0f} s"

    def _time_left(self) -> str:
        if not self._total or not self._done.source_bytes:
            return ""
        share = self._done.source_bytes / self._total
        return f", {share:.0%}, {(time.monotonic() - self._start) * (1 / share - 1):.0f} s left"
