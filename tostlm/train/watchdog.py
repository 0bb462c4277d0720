"""A rank that hangs or dies is named, and the job ends in time, whatever the ranks were waiting for.

Each rank has a thread that writes a heartbeat file and watches its own main thread. Once that is quiet for long, the
thread looks at all ranks' files, and the first to come to a verdict ends them all; no rank needs another to end.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

from tostlm.config import RunConfig
from tostlm.errors import EXIT_LOST_RANK, error_summary, is_lost_peer
from tostlm.files import write_atomically
from tostlm.launch import RankInfo, exit_rank
from tostlm.train.heartbeat import (
    FAILED,
    HUNG,
    PARTED,
    Beats,
    Heartbeat,
    culprits,
    frozen,
    heartbeat_file,
    process_start,
    read_heartbeats,
    stack_file,
    this_machine,
    write_heartbeat,
)

START_SECONDS = 1800.0  # in which a run starts and does its first step, which may compile
LOOK, JUDGE = 0.3, 0.6  # of the timeout: quiet so long, a rank looks at the others, and judges; the rest is for ending
POLL_SECONDS = 0.1
GO_ON = "start again to go on from the newest checkpoint"
NAMED = 8  # ranks in one line


class _Main(NamedTuple):
    """The main thread's last beat, replaced whole so that the watching thread never sees half of one."""

    step: int
    phase: str
    place: int
    moves: int
    quiet_from: float  # monotonic seconds


def heartbeats_folder(config: RunConfig) -> Path:
    """Where a run's ranks tell each other that they live; gone when it ends well."""
    return config.run_dir / "heartbeats"


def clear_heartbeats(config: RunConfig) -> None:
    """Remove those of a run that crashed; what hangs have left to read stays."""
    shutil.rmtree(heartbeats_folder(config), ignore_errors=True)


class Watchdog:
    """Ends this process with EXIT_LOST_RANK when a rank hangs or dies, and names that rank.

    Every rank enters it before its first step, when the folder of heartbeats holds none of an earlier run, and beats
    at the same places of the program. An error that only tells of a lost peer does not leave it; all others do.
    """

    def __init__(self, config: RunConfig, ranks: RankInfo) -> None:
        self._rank, self._world = ranks.rank, ranks.world_size
        self._timeout = float(config.train.hang_timeout_seconds)
        self._interval = min(10.0, max(0.2, self._timeout / 10))
        self._run_dir, self._folder = config.run_dir, heartbeats_folder(config)
        self._verdict = self._folder / "verdict"  # made by the first rank that has come to one; ends all others
        self._host, self._machine, self._started = socket.gethostname(), this_machine(), process_start(os.getpid())
        self._allowance = max(0.0, START_SECONDS - self._timeout)
        self._main = _Main(0, "start", 0, 0, time.monotonic() + self._allowance)
        self._first_step: int | None = None
        self._last_word: str | None = None
        self._beats = 0
        self._publishing, self._leaving = threading.Lock(), threading.Lock()  # who leaves keeps the latter
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        """Say that the main thread has come to a phase (data, forward, ...) once `step` steps were done."""
        if self._first_step is None:
            self._first_step = step
        before = self._main
        place = before.place + 1 if step == before.step else 1
        allowance = self._allowance if step == self._first_step else 0.0
        self._main = _Main(step, phase, place, before.moves + 1, time.monotonic() + allowance)

    def waiting(self) -> None:
        """Say that the main thread waits for a disk where it is, which may be long."""
        self._main = self._main._replace(moves=self._main.moves + 1, quiet_from=time.monotonic())

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stack = stack_file(self._folder, self._rank).open("w")
        # A watcher's question to a rank that does not answer. Other threads' stacks change while this one's is written.
        faulthandler.register(signal.SIGUSR2, self._stack, all_threads=False)
        self._publish()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.acquire()  # for ever where the watching thread is about to end the process
        if isinstance(error, Exception):
            if is_lost_peer(error):
                self._part(error)
            self._last_word = FAILED
        self._done.set()
        self._thread.join()
        self._publish()
        faulthandler.unregister(signal.SIGUSR2)
        self._stack.close()
        if self._last_word is None:
            for file in (heartbeat_file(self._folder, self._rank), stack_file(self._folder, self._rank)):
                file.unlink(missing_ok=True)
            with suppress(OSError):  # the last rank finds it empty
                self._folder.rmdir()

    def _watch(self) -> None:
        earlier: Beats | None = None
        while not self._done.wait(self._interval):
            self._publish()
            quiet = time.monotonic() - self._main.quiet_from
            if quiet < LOOK * self._timeout and not self._verdict.exists():
                earlier = None
                continue
            later = self._look()
            still, lost = [], []
            if earlier is not None:  # the first look of a rank that was stopped itself tells it nothing
                still = frozen(earlier, later, self._world)
                if quiet >= JUDGE * self._timeout:  # others' heartbeats may be an interval old
                    lost = culprits(earlier, later, self._world, JUDGE * self._timeout - self._interval)
            if (lost or self._verdict.exists()) and self._leaving.acquire(blocking=False):
                self._end(lost, still, later, quiet)
            earlier = earlier or later

    def _heartbeat(self) -> Heartbeat:
        main = self._main
        return Heartbeat(
            rank=self._rank,
            host=self._host,
            machine=self._machine,
            pid=os.getpid(),
            started=self._started,
            step=main.step,
            phase=main.phase,
            place=main.place,
            moves=main.moves,
            beats=self._beats,
            quiet_seconds=round(time.monotonic() - main.quiet_from, 1),
            last_word=self._last_word,
        )

    def _publish(self) -> None:
        with self._publishing, suppress(OSError):  # a full disk ends a run where it saves, not here
            self._beats += 1
            write_heartbeat(self._folder, self._heartbeat())

    def _say(self, last_word: str) -> None:
        self._last_word = last_word
        self._publish()

    def _look(self) -> dict[int, Heartbeat]:
        return {**read_heartbeats(self._folder, self._world), self._rank: self._heartbeat()}

    def _end(self, lost: Sequence[int], still: Sequence[int], beats: Beats, quiet: float) -> NoReturn:
        """Leave a run in which nothing moves: all write their stacks, the first says who is to blame, then all end."""
        speaks = bool(lost) and self._is_first()
        faulthandler.dump_traceback(self._stack)
        self._say(HUNG)
        watching = [beat for rank, beat in beats.items() if rank not in still]
        if self._rank == min(beat.rank for beat in watching if beat.machine == self._machine):
            self._wake([beats[rank] for rank in still if rank in beats])
        told = self._verdict / "told"
        if speaks:
            machines = {beat.machine for beat in watching}
            writing = [r for r, b in beats.items() if b.machine in machines and not b.process_is_gone(self._machine)]
            self._wait_for_stacks(writing)
            # A frozen rank's heartbeat may be an interval old; it is where this rank waits for it, or before.
            since = beats[self._rank] if still else beats[lost[0]]
            folder = self._report(since.step, lost, still, beats)
            stand = f"{_names(lost, beats)} {'has' if len(lost) == 1 else 'have'} not moved since {since.where}"
            _print(f"{stand} for {quiet:.0f} s; stacks are in {folder}; {GO_ON}")
            with suppress(OSError):
                told.touch()
        else:
            self._wait_until(told.exists, 3 * self._interval)
        exit_rank(EXIT_LOST_RANK)

    def _is_first(self) -> bool:
        try:
            self._verdict.mkdir()
        except FileExistsError:
            return False
        except OSError:
            pass  # better said twice than not at all
        return True

    def _wake(self, still: Sequence[Heartbeat]) -> None:
        """Have the frozen ranks of this machine write their stacks: a stopped one does so when it goes on."""
        for beat in still:
            if beat.machine == self._machine and not beat.process_is_gone(self._machine):
                with suppress(OSError, AttributeError):
                    # kill(2) would let any thread take it that is the first to go on.
                    ctypes.CDLL(None).tgkill(beat.pid, beat.pid, signal.SIGUSR2)
                    os.kill(beat.pid, signal.SIGCONT)

    def _wait_for_stacks(self, ranks: Sequence[int]) -> None:
        """Until they are written and grow no longer; other ranks may judge an interval later than this one."""
        sizes: list[int] = []

        def whole() -> bool:
            before, sizes[:] = list(sizes), [stack_file(self._folder, rank).stat().st_size for rank in ranks]
            return all(sizes) and sizes == before

        self._wait_until(whole, 1.5 * self._interval)

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(OSError):
                if condition():
                    return
            time.sleep(POLL_SECONDS)

    def _report(self, step: int, lost: Sequence[int], still: Sequence[int], beats: Beats) -> Path:
        """Put what all ranks were doing, and their stacks, in a folder that the next start leaves alone."""
        folder = self._run_dir / f"hang-step-{step:08d}"
        lines = []
        for rank in range(self._world):
            said = beats[rank]._asdict() if rank in beats else {"rank": rank}
            stack = None  # no watcher on its host, or a process that is gone
            with suppress(OSError):
                file = stack_file(self._folder, rank)
                if file.stat().st_size:
                    folder.mkdir(exist_ok=True)
                    stack = file.replace(folder / file.name).name
            lines.append({**said, "to_blame": rank in lost, "frozen": rank in still, "stack": stack})
        with suppress(OSError):
            write_atomically(folder / "ranks.json", json.dumps(lines, indent=1) + "\n")
        return folder

    def _part(self, error: Exception) -> NoReturn:
        """Leave a run whose collective has lost a peer: find out which rank is gone, and have one rank say so."""
        self._say(PARTED)
        first, deadline = self._look(), time.monotonic() + 3 * self._interval
        while True:
            now = self._look()
            late = time.monotonic() >= deadline
            explained = [r for r in range(self._world) if r not in now or now[r].last_word in (FAILED, PARTED, HUNG)]
            unchanged = frozen(first, now, self._world) if late else []
            gone = [
                rank
                for rank, beat in now.items()
                if rank not in explained and (rank in unchanged or beat.process_is_gone(self._machine))
            ]
            spoken_for = any(rank not in now or now[rank].last_word in (FAILED, HUNG) for rank in explained)
            if gone or spoken_for or late or len(explained) == self._world:
                break
            time.sleep(POLL_SECONDS)
        speaker = min(rank for rank in now if rank not in gone)
        if self._rank == speaker and gone:
            _print(f"{_names(gone, now)} ended without a word in step {self._main.step}; {GO_ON}")
        elif self._rank == speaker and not spoken_for:
            _print(f"{now[self._rank].who} lost its connection to the other ranks ({error_summary(error)}); {GO_ON}")
        exit_rank(EXIT_LOST_RANK)


def _names(ranks: Sequence[int], beats: Beats) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return ", ".join(beats[rank].who if rank in beats else f"rank {rank}" for rank in ranks[:NAMED]) + more


def _print(line: str) -> None:
    print(f"tostlm: {line}", file=sys.stderr, flush=True)
