"""Detects ranks that hang or die, names them, and ends the job in time, whatever the ranks were waiting for.

Each rank has a thread that writes a heartbeat file and watches its own main thread. When the main thread makes no
progress for long, the thread reads the heartbeats of all ranks. The first rank that finds a rank stalled ends them
all; none of them needs another to end.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from tostlm.config import RunConfig
from tostlm.errors import EXIT_LOST_RANK, error_summary, is_lost_peer, report
from tostlm.files import write_atomically
from tostlm.launch import RankInfo, exit_rank

START_SECONDS = 1800.0  # allowed for the start and the first step, which may compile
# Fractions of the timeout after which an idle rank reads the others' heartbeats, and decides; the rest is for ending.
READ_AFTER, DECIDE_AFTER = 0.3, 0.6
GUARD_AFTER = 0.85  # fraction of the timeout after which a rank ends whose watching thread hangs itself
POLL_SECONDS = 0.1
ADVICE = "run the same command to resume from the newest checkpoint"
MAX_NAMED_RANKS = 8  # in one line

HEARTBEATS = "heartbeats"  # folder in `run_dir`, which is removed when the run ends well
BEAT, STACK = ".json", ".txt"  # suffixes of the two files of a rank in it

# The status of a rank that ends.
FAILED = "failed"  # by an error of its own, which it has printed
LOST_PEER = "lost peer"  # because a collective lost the rank at its other end
HUNG = "hung"  # because nothing moves; it has written its stack


class Heartbeat(NamedTuple):
    """One rank at one moment. It holds counts and a duration, and no time of day, because hosts' clocks differ."""

    rank: int
    host: str
    pid_namespace: str  # in which `pid` is valid; empty where processes cannot be seen
    pid: int
    process_start: str  # distinguishes the process from a later one with the same pid
    step: int  # finished steps
    phase: str
    phase_index: int = 0  # phases begun in this step: the same position in the code on all ranks
    writes: int = 0  # of this file by the watching thread
    idle_seconds: float = 0.0  # since the main thread's last progress; below 0 while it may still start up
    status: str | None = None

    @property
    def visible(self) -> bool:
        """Whether this process can see that of the rank: they share a machine and a pid namespace."""
        return bool(self.pid_namespace) and self.pid_namespace == _pid_namespace()

    @property
    def gone(self) -> bool:
        """Whether the rank's process has ended, as far as this process can see."""
        return self.visible and _start_of(self.pid) != self.process_start


Heartbeats = Mapping[int, Heartbeat]  # by rank, of the ranks whose files exist


def read_heartbeats(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """Return the heartbeat of every rank that has written one."""
    beats = {}
    for rank in range(world_size):
        with suppress(OSError, ValueError, TypeError):  # not started, ended, or a file system that is gone
            beats[rank] = Heartbeat(**json.loads(_rank_file(folder, rank, BEAT).read_text()))
    return beats


def frozen_ranks(earlier: Heartbeats, later: Heartbeats, world_size: int) -> list[int]:
    """Return the ranks that wrote no heartbeat between two readings: stopped, dead, or on a lost node."""
    return [
        rank
        for rank in range(world_size)
        if rank not in later or (rank in earlier and earlier[rank].writes == later[rank].writes)
    ]


def stalled_ranks(beats: Heartbeats, frozen: Sequence[int], max_idle_seconds: float) -> list[int]:
    """Return the ranks that all others wait for: the frozen ones, or if there are none, those furthest behind.

    While the main thread of any rank was idle for less than `max_idle_seconds`, no rank counts as stalled.
    """
    writing = [beat for rank, beat in beats.items() if rank not in frozen]
    if any(beat.idle_seconds < max_idle_seconds for beat in writing):
        return []
    if frozen:
        return [rank for rank in frozen if rank not in beats or beats[rank].status not in (FAILED, LOST_PEER)]
    last = min((beat.step, beat.phase_index) for beat in writing)
    return [beat.rank for beat in writing if (beat.step, beat.phase_index) == last]


def clear_heartbeats(config: RunConfig) -> None:
    """Remove the heartbeats of a run that crashed; the reports of hangs stay."""
    shutil.rmtree(config.run_dir / HEARTBEATS, ignore_errors=True)


class Watchdog:
    """Ends this process with `EXIT_LOST_RANK` when a rank hangs or dies, and names that rank.

    A context manager that every rank enters before its first step, after rank 0 has called `clear_heartbeats`. An error
    that only reports a lost peer ends the process; all other errors are raised.
    """

    def __init__(self, config: RunConfig, ranks: RankInfo) -> None:
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._timeout = float(config.train.hang_timeout_seconds)
        self._interval = min(10.0, max(0.2, self._timeout / 10))
        self._run_dir, self._folder = config.run_dir, config.run_dir / HEARTBEATS
        self._heartbeat_file = _rank_file(self._folder, self._rank, BEAT)
        self._stack_file = _rank_file(self._folder, self._rank, STACK)
        self._verdict = self._folder / "verdict"  # made by the first rank that finds a rank stalled; ends all others
        self._start_allowance = max(0.0, START_SECONDS - self._timeout)
        host, pid = socket.gethostname(), os.getpid()
        start = Heartbeat(self._rank, host, _pid_namespace(), pid, _start_of(pid), step=0, phase="start")
        # The main thread's progress, and from when on it counts as idle. The pair is replaced whole, so that the
        # watching thread never reads half of an update.
        self._main = start, time.monotonic() + self._start_allowance
        self._first_step: int | None = None
        self._status: str | None = None
        self._writes = 0
        self._writing, self._ending = threading.Lock(), threading.Lock()  # the thread that ends keeps the latter
        self._done, self._left = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched_at = time.monotonic()  # when the watching thread last began to look
        self._guard = threading.Thread(target=self._guard_against_files, name="watchdog-guard", daemon=True)

    def record_phase(self, step: int, phase: str) -> None:
        """Record that the main thread begins a phase (data, forward, ...) after `step` finished steps.

        All ranks must record the same phases in the same order.
        """
        if self._first_step is None:
            self._first_step = step
        before, _ = self._main
        index = before.phase_index + 1 if step == before.step else 1
        allowance = self._start_allowance if step == self._first_step else 0.0
        self._main = before._replace(step=step, phase=phase, phase_index=index), time.monotonic() + allowance

    def wait_for_files(self, progress: bool) -> None:
        """Record that the main thread waits for files, its own and other ranks', which is no hang with `progress`.

        It ends the process if a rank is gone, which would be waited for.
        """
        if progress:
            self._main = self._main[0], time.monotonic()
        if any(beat.gone for beat in self._read_heartbeats().values() if beat.status is None):
            self._ending.acquire()  # see __exit__
            self._end_after_lost_peer(ConnectionResetError("a rank is gone"))

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stack = self._stack_file.open("w")
        # Other ranks request this rank's stack by SIGUSR2. It holds the main thread alone: the other threads' stacks
        # change while they are written.
        faulthandler.register(signal.SIGUSR2, self._stack, all_threads=False)
        self._write_heartbeat()
        self._thread.start()
        self._guard.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ending.acquire()  # blocks for ever if the watching thread is about to end the process
        if isinstance(error, Exception) and is_lost_peer(error):
            self._end_after_lost_peer(error)
        self._done.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        self._stack.close()
        if isinstance(error, Exception):
            self._write_heartbeat(FAILED)
        else:
            with suppress(OSError):  # only the last rank finds the folder empty
                self._heartbeat_file.unlink(missing_ok=True)
                self._stack_file.unlink(missing_ok=True)
                self._folder.rmdir()
        self._left.set()

    def _watch(self) -> None:
        earlier: Heartbeats | None = None
        while not self._done.wait(self._interval):
            self._watched_at = time.monotonic()
            self._write_heartbeat()
            idle = time.monotonic() - self._main[1]
            if idle < READ_AFTER * self._timeout and not self._has_verdict():
                earlier = None
                continue
            later = self._read_heartbeats()
            # One reading is not enough: this rank may have been stopped itself until now.
            frozen = frozen_ranks(earlier, later, self._world_size) if earlier else []
            stalled: list[int] = []
            if earlier and idle >= DECIDE_AFTER * self._timeout:  # heartbeats may be an interval old
                stalled = stalled_ranks(later, frozen, DECIDE_AFTER * self._timeout - self._interval)
            if (stalled or self._has_verdict()) and self._ending.acquire(blocking=False):
                self._end_hung_run(stalled, frozen, later, idle)
            earlier = earlier or later

    def _guard_against_files(self) -> None:
        """End this process in time where `run_dir` hangs and the watching thread with it; this thread reads no file."""
        while not self._left.wait(self._interval):
            now = time.monotonic()
            idle, blocked = now - self._main[1], now - self._watched_at
            if idle >= GUARD_AFTER * self._timeout and blocked > 2 * self._interval:
                # Standard error and the report may be files that hang too.
                end = threading.Thread(target=self._end_without_files, args=(min(idle, blocked),), daemon=True)
                end.start()
                end.join(self._interval)
                os._exit(EXIT_LOST_RANK)

    def _end_without_files(self, seconds: float) -> NoReturn:
        where = _names([self._rank], {self._rank: self._main[0]})
        report(f"{where}: {self._run_dir} has not answered for {seconds:.0f} s; {ADVICE}")
        exit_rank(EXIT_LOST_RANK)

    def _heartbeat(self) -> Heartbeat:
        progress, idle_from = self._main
        idle_seconds = round(time.monotonic() - idle_from, 1)
        return progress._replace(writes=self._writes, idle_seconds=idle_seconds, status=self._status)

    def _write_heartbeat(self, status: str | None = None) -> None:
        """Write the heartbeat, from now on with a `status` if one is given."""
        with self._writing, suppress(OSError):  # a full disk ends a run where it saves, not here
            self._writes, self._status = self._writes + 1, status or self._status
            write_atomically(self._heartbeat_file, json.dumps(self._heartbeat()._asdict()), durable=False)

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        return {**read_heartbeats(self._folder, self._world_size), self._rank: self._heartbeat()}

    def _end_hung_run(self, stalled: Sequence[int], frozen: Sequence[int], beats: Heartbeats, idle: float) -> NoReturn:
        """End a run in which nothing moves: all ranks write their stacks, the first reports, then all end."""
        reports = bool(stalled) and self._create_verdict()
        faulthandler.dump_traceback(self._stack)
        self._write_heartbeat(HUNG)
        watching = [beat for rank, beat in beats.items() if rank not in frozen]
        if self._rank == min((beat.rank for beat in watching if beat.visible), default=None):
            _request_stacks([beats[rank] for rank in frozen if rank in beats])
        reported = self._verdict / "reported"
        if reports:
            namespaces = {beat.pid_namespace for beat in watching}
            watched = [rank for rank, beat in beats.items() if beat.pid_namespace in namespaces and not beat.gone]
            self._wait_for_stacks(watched)
            # A frozen rank's heartbeat may be an interval old; it is where this rank waits for it, or before.
            since = beats[self._rank] if frozen else beats[stalled[0]]
            folder = self._write_report(since.step, stalled, frozen, beats)
            subject = f"{_names(stalled, beats)} {'has' if len(stalled) == 1 else 'have'}"
            progress = f"made no progress since step {since.step} ({since.phase}) for {idle:.0f} s"
            report(f"{subject} {progress}; stacks are in {folder}; {ADVICE}")
            with suppress(OSError):
                reported.touch()
        else:
            self._wait_until(reported.exists, 3 * self._interval)
        exit_rank(EXIT_LOST_RANK)

    def _has_verdict(self) -> bool:
        return os.access(self._verdict, os.F_OK)  # False, and no error, on a file system that is gone

    def _create_verdict(self) -> bool:
        """Return whether this rank is the first that found a rank stalled."""
        with suppress(OSError):
            self._verdict.mkdir()
            return True
        return not self._has_verdict()  # where none can be made, two reports are better than none

    def _wait_for_stacks(self, ranks: Sequence[int]) -> None:
        """Wait until all stack files exist and grow no longer; other ranks may act an interval later than this one."""
        files = [_rank_file(self._folder, rank, STACK) for rank in ranks]
        sizes: list[int] = []

        def complete() -> bool:
            before, sizes[:] = list(sizes), [file.stat().st_size for file in files]
            return all(sizes) and sizes == before

        self._wait_until(complete, 1.5 * self._interval)

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(OSError):
                if condition():
                    return
            time.sleep(POLL_SECONDS)

    def _write_report(self, step: int, stalled: Sequence[int], frozen: Sequence[int], beats: Heartbeats) -> Path:
        """Write what all ranks were doing, and their stacks, into a folder that later starts do not touch."""
        folder = self._run_dir / f"hang-step-{step:08d}"
        entries = []
        for rank in range(self._world_size):
            heartbeat = beats[rank]._asdict() if rank in beats else {"rank": rank}
            stack = None  # there is none of a process that is gone, or on a host where no rank watches
            with suppress(OSError):
                file = _rank_file(self._folder, rank, STACK)
                if file.stat().st_size:
                    folder.mkdir(exist_ok=True)
                    stack = file.replace(folder / file.name).name
            entries.append({**heartbeat, "stalled": rank in stalled, "frozen": rank in frozen, "stack": stack})
        with suppress(OSError):
            write_atomically(folder / "ranks.json", json.dumps(entries, indent=1) + "\n")
        return folder

    def _end_after_lost_peer(self, error: Exception) -> NoReturn:
        """End after a collective lost a peer: find out which rank is gone, and let one rank report it."""
        self._write_heartbeat(LOST_PEER)
        first, deadline = self._read_heartbeats(), time.monotonic() + 3 * self._interval
        while True:
            beats = self._read_heartbeats()
            late = time.monotonic() >= deadline
            unexplained = [beat for beat in beats.values() if beat.status is None]
            frozen = frozen_ranks(first, beats, self._world_size) if late else []
            gone = [beat.rank for beat in unexplained if beat.rank in frozen or beat.gone]
            # A rank that failed, hung or ended well has printed why, or its launcher knows.
            reported = len(beats) < self._world_size or any(beat.status in (FAILED, HUNG) for beat in beats.values())
            if gone or reported or late or not unexplained:
                break
            time.sleep(POLL_SECONDS)
        if self._rank == min(rank for rank in beats if rank not in gone):
            if gone:
                report(f"{_names(gone, beats)} died without an error message in step {self._main[0].step}; {ADVICE}")
            elif not reported:
                name = _names([self._rank], beats)
                report(f"{name} lost its connection to the other ranks ({error_summary(error)}); {ADVICE}")
        exit_rank(EXIT_LOST_RANK)


def _request_stacks(frozen: Sequence[Heartbeat]) -> None:
    """Make the frozen ranks on this machine write their stacks; a stopped process does so when it continues."""
    for beat in frozen:
        if beat.visible and not beat.gone:
            with suppress(OSError, AttributeError):
                # kill(2) could deliver the signal to any thread of the process.
                ctypes.CDLL(None).tgkill(beat.pid, beat.pid, signal.SIGUSR2)
                os.kill(beat.pid, signal.SIGCONT)


def _rank_file(folder: Path, rank: int, suffix: str) -> Path:
    return folder / f"rank-{rank:05d}{suffix}"


@cache
def _pid_namespace() -> str:
    """Return what two processes share that can see each other's pids: a boot of Linux and a pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (the link's target is not a path)
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks since boot; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]  # proc_pid_stat(5): field 22; the state is field 3


def _names(ranks: Sequence[int], beats: Heartbeats) -> str:
    places = {rank: f" on {beat.host} (pid {beat.pid})" for rank, beat in beats.items()}
    more = f" and {len(ranks) - MAX_NAMED_RANKS} more" if len(ranks) > MAX_NAMED_RANKS else ""
    return ", ".join(f"rank {rank}{places.get(rank, '')}" for rank in ranks[:MAX_NAMED_RANKS]) + more
