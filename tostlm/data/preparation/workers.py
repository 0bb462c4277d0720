"""Work units shared out over processes, and the progress of the work."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tqdm import tqdm

from tostlm.data.preparation.plan import PreparationPlan
from tostlm.errors import UserError

LINE_SECONDS = 60  # between two lines of progress if there is no terminal


class WorkDone(NamedTuple):
    """What was done since the last report."""

    source_bytes: int = 0  # as they are on disk
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


UnitFunction = Callable[[Path, int, int, Callable[[WorkDone], None]], None]
Jobs: TypeAlias = "Queue[int | None]"  # work units, and None for each worker at the end
Reports: TypeAlias = "Queue[WorkDone | Exception | None]"  # None from a worker that has ended


def run_workers(do: UnitFunction, out: Path, plan: PreparationPlan, units: Sequence[int], workers: int) -> None:
    """Call `do(out, unit, threads, report)` for every work unit, on up to `workers` cores.

    Several units are done by a process each, which share the cores; a single one by threads of this process.

    Raises:
        UserError: a worker raised it or was killed. The other workers are ended; finished units stay.
    """
    progress = ProgressBar(plan, units)
    processes = min(workers, len(units))
    try:
        if processes <= 1:
            for unit in units:
                do(out, unit, workers, progress.add)
        else:
            _run_processes(do, out, units, processes, workers // processes, progress)
    finally:
        progress.close()


def _run_processes(
    do: UnitFunction, out: Path, units: Sequence[int], processes: int, threads: int, progress: ProgressBar
) -> None:
    context = multiprocessing.get_context("spawn")
    jobs: Jobs = context.Queue()
    reports: Reports = context.Queue()
    for job in [*units, *[None] * processes]:
        jobs.put(job)
    arguments = (do, out, threads, jobs, reports)
    started = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(processes)]
    try:
        for process in started:
            process.start()
        ended = 0
        while ended < processes:
            try:
                report = reports.get(timeout=1)
            except queue.Empty:
                killed = [process for process in started if process.exitcode not in (None, 0)]
                if killed:
                    raise UserError(
                        f"a worker ended with code {killed[0].exitcode} (-9: killed, mostly for lack of memory); run "
                        "the command again, with fewer --workers if need be: it continues from what is finished"
                    ) from None
                continue
            if isinstance(report, WorkDone):
                progress.add(report)
            elif report is None:
                ended += 1
            else:
                raise report
    finally:
        for process in started:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(do: UnitFunction, out: Path, threads: int, jobs: Jobs, reports: Reports) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    try:
        while (unit := jobs.get()) is not None:
            do(out, unit, threads, reports.put)
        reports.put(None)
    except (UserError, OSError, MemoryError) as error:
        reports.put(error)


class ProgressBar:
    """A bar on a terminal, a line a minute elsewhere: documents, tokens, MB of text per second, the time left."""

    def __init__(self, plan: PreparationPlan, units: Sequence[int]) -> None:
        sizes = [plan.units[unit].bytes for unit in units]
        self._total = 0 if None in sizes else sum(size or 0 for size in sizes)  # 0: unknown
        self._done = WorkDone()
        self._start = self._last_line = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total or None, unit="B", unit_scale=True, desc="prepare", disable=not self._terminal
        )

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
