"""Parts shared out over processes, and what is seen of it meanwhile."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tostlm.data.preparation.plan import PreparationPlan
from tostlm.errors import UserError

SILENCE_SECONDS = 60  # between two lines where there is no terminal


class WorkDone(NamedTuple):
    """What was done since the last report."""

    source_bytes: int = 0  # as they are on disk
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


PartFunction = Callable[[Path, int, int, Callable[[WorkDone], None]], None]


def run_workers(do: PartFunction, out: Path, plan: PreparationPlan, parts: Sequence[int], workers: int) -> None:
    """Call `do(out, part, threads, say)` for every part, on up to `workers` cores.

    Several parts are done by a process each, with the cores shared among them; a single one by threads of this process.

    Raises:
        UserError: of a worker, or because one was killed. The others are ended; what is finished stays.
    """
    progress = ProgressBar(plan, parts)
    try:
        processes = min(workers, len(parts))
        if processes <= 1:
            for part in parts:
                do(out, part, workers, progress.add)
        else:
            _run_processes(do, out, parts, processes, workers // processes, progress)
    finally:
        progress.close()


def _run_processes(
    do: PartFunction, out: Path, parts: Sequence[int], processes: int, threads: int, progress: ProgressBar
) -> None:
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    reports: Any = context.Queue()
    for part in parts:
        jobs.put(part)
    for _ in range(processes):
        jobs.put(None)
    started = [
        context.Process(target=_work, args=(do, out, threads, jobs, reports), daemon=True) for _ in range(processes)
    ]
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
                        "the command again, with fewer --workers if need be: it goes on from what is finished"
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


def _work(do: PartFunction, out: Path, threads: int, jobs: Any, reports: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    try:
        while (part := jobs.get()) is not None:
            do(out, part, threads, reports.put)
        reports.put(None)
    except (UserError, OSError, MemoryError) as error:
        reports.put(error)


class ProgressBar:
    """A bar on a terminal, a line a minute elsewhere: documents, tokens, MB of text a second, the time that is left."""

    def __init__(self, plan: PreparationPlan, parts: Sequence[int]) -> None:
        sizes = [plan.parts[part].bytes for part in parts]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._done = WorkDone()
        self._began = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, unit="B", unit_scale=True, desc="prepare", disable=not self._terminal)

    def add(self, work: WorkDone) -> None:
        """Count what a worker did."""
        self._done = WorkDone(*(a + b for a, b in zip(self._done, work, strict=True)))
        if self._terminal:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(work.source_bytes)
        elif time.monotonic() - self._said > SILENCE_SECONDS:
            self._said = time.monotonic()
            print(f"prepare: {self._rates()}{self._left()}", flush=True)

    def close(self) -> None:
        self._bar.close()
        if self._done.documents:
            print(f"prepare: {self._rates()}", flush=True)

    def _rates(self) -> str:
        seconds = time.monotonic() - self._began
        done = self._done
        speed = done.text_bytes / seconds / 1e6
        return f"{done.documents:,} documents, {done.tokens:,} tokens, {speed:.1f} MB/s, {seconds:.0f} s"

    def _left(self) -> str:
        if not self._total or not self._done.source_bytes:
            return ""
        seconds = time.monotonic() - self._began
        left = seconds * (self._total / self._done.source_bytes - 1)
        return f", {self._done.source_bytes / self._total:.0%}, {left:.0f} s left"
