"""What each rank says of itself in a file, and who holds the others up by what all say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tostlm.files import write_atomically

# What a rank says last.
FAILED = "failed"  # it ends by an error of its own, which it has said
PARTED = "parted"  # it ends because it lost a peer
HUNG = "hung"  # it ends because nothing moves, and has written its stack


class Heartbeat(NamedTuple):
    """One rank at one moment. Hosts' clocks differ, so it holds counts and a duration, and no time of day."""

    rank: int
    host: str
    machine: str  # whose process numbers `pid` is one of; empty where they are not to be seen
    pid: int
    started: str  # of the process, which tells it from a later one of its number
    step: int
    phase: str
    place: int  # beats of the main thread within the step: the same number is the same place in the program
    moves: int  # beats of the main thread
    beats: int  # of the watching thread
    quiet_seconds: float  # since the main thread's last beat; below 0 while it may still start up
    last_word: str | None = None

    @property
    def where(self) -> str:
        return f"step {self.step} ({self.phase})"

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def process_is_gone(self, machine: str) -> bool:
        """Whether its process has ended, as far as `machine` can see it."""
        return bool(machine) and self.machine == machine and process_start(self.pid) != self.started


Beats = Mapping[int, Heartbeat]  # of the ranks whose files are there


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Put it in place of the rank's earlier one."""
    write_atomically(heartbeat_file(folder, beat.rank), json.dumps(beat._asdict()), durable=False)


def read_heartbeats(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """Of every rank that has one."""
    beats = {}
    for rank in range(world_size):
        try:
            beats[rank] = Heartbeat(**json.loads(heartbeat_file(folder, rank).read_text()))
        except (OSError, ValueError, TypeError):  # not started, ended, or a file system that is no more
            continue
    return beats


def heartbeat_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def frozen(earlier: Beats, later: Beats, world_size: int) -> list[int]:
    """The ranks whose watching threads did not beat between two looks: stopped, dead, or on a lost node."""
    return [
        rank
        for rank in range(world_size)
        if rank not in later or (rank in earlier and earlier[rank].beats == later[rank].beats)
    ]


def culprits(earlier: Beats, later: Beats, world_size: int, limit: float) -> list[int]:
    """The ranks that hold all others up, by two looks at all heartbeats; none while any main thread moves.

    A rank that does not beat is to blame before one that does; of those that all beat, the ones furthest behind.

    Args:
        limit: seconds without a beat of its main thread in which a rank may still be moving.
    """
    still = frozen(earlier, later, world_size)
    beating = [beat for rank, beat in later.items() if rank not in still]
    if any(beat.quiet_seconds < limit for beat in beating):
        return []
    if still:
        return [rank for rank in still if rank not in later or later[rank].last_word not in (FAILED, PARTED)]
    behind = min((beat.step, beat.place) for beat in beating)
    return [beat.rank for beat in beating if (beat.step, beat.place) == behind]


def this_machine() -> str:
    """What two processes share that see each other's process numbers: a boot of Linux and a namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (it is no path)
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's count; empty where it is no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]  # proc_pid_stat(5): the 22nd, the state being the 3rd
