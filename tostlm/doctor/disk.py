"""Room for the checkpoints that a run keeps, on a disk that every host writes and sees."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tostlm.checkpoint import checkpoints
from tostlm.config import RunConfig
from tostlm.doctor.finding import FAIL, OK, WARN, Finding, amount, named, unfit
from tostlm.doctor.plan import parameters, weight_bytes
from tostlm.files import require_writable

PROBE_BYTES, CHUNK_BYTES = 1 << 26, 1 << 22
OPTIMIZER_BYTES = 12  # a parameter: AdamW's two moments and the weights in fp32
MARK = ".doctor"


class Disk(NamedTuple):
    """The run's folder as one host sees it."""

    shared: bool  # whether it sees what rank 0 wrote there
    free_bytes: int
    write_bytes_per_second: float
    error: str


@contextmanager
def marked(run_dir: Path) -> Iterator[None]:
    """On rank 0: a file in the run's folder for the other hosts to see; a folder made for it goes with it.

    Raises:
        UserError: nothing can be written there.
    """
    made = not run_dir.exists()
    require_writable(run_dir)
    mark = run_dir / MARK
    try:
        mark.touch()
        yield
    finally:
        mark.unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                run_dir.rmdir()


def measure(config: RunConfig, rank: int) -> Disk:
    """Write beside rank 0's mark, to the disk itself, and remove that again. For one rank of a host."""
    folder = config.run_dir
    if not (folder / MARK).exists():
        return Disk(False, 0, 0.0, "")
    free = shutil.disk_usage(folder).free
    probe = folder / f"{MARK}-{rank}"
    content = os.urandom(CHUNK_BYTES)
    size = max(1, min(PROBE_BYTES, free // 2))
    try:
        start = time.perf_counter()
        with probe.open("wb") as file:
            for written in range(0, size, CHUNK_BYTES):
                file.write(content[: size - written])
            file.flush()
            os.fsync(file.fileno())
        return Disk(True, free, size / (time.perf_counter() - start), "")
    except OSError as error:
        return Disk(True, free, 0.0, str(error.strerror))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def checkpoint_bytes(config: RunConfig) -> int:
    """What one checkpoint takes: AdamW's state with the weights it updates, and the file of the weights alone."""
    return OPTIMIZER_BYTES * parameters(config) + (weight_bytes(config) if config.train.save_weights else 0)


def checkpoints_to_come(config: RunConfig) -> int:
    """How many more a run keeps at its end than are there, and the one that is being written beside them."""
    train = config.train
    kept = -(-train.steps // train.save_every_steps)
    if train.keep_last_checkpoints:
        special = train.steps // train.keep_every_steps if train.keep_every_steps else 0
        kept = min(kept, train.keep_last_checkpoints + special + train.keep_best_checkpoint)
    return max(0, kept - len(checkpoints(config.run_dir))) + 1


def judge(disks: Sequence[tuple[int, Disk]], config: RunConfig, hosts: Sequence[str]) -> Finding:
    """Whether each host's disk, with the rank that saw it, takes what the run will write."""
    run_dir = config.run_dir
    apart = [rank for rank, disk in disks if not disk.shared]
    if apart:
        why = f"{run_dir} does not show there what rank 0 wrote"
        return unfit("disk", apart, hosts, why, "put run_dir on a file system that all hosts share")
    for rank, disk in disks:
        if disk.error:
            return unfit("disk", [rank], hosts, f"cannot write in {run_dir}: {disk.error}", "make room or mend that")
    one, count = checkpoint_bytes(config), checkpoints_to_come(config)
    rank, least = min(disks, key=lambda pair: pair[1].free_bytes)
    _, slowest = min(disks, key=lambda pair: pair[1].write_bytes_per_second)
    need = f"{count} checkpoints of {amount(one, 'B')}"
    measured = f"{amount(least.free_bytes, 'B')} free in {run_dir} for {need}"
    if least.free_bytes < one:
        return Finding("disk", FAIL, f"{measured} ({named([rank], hosts)})", "make room or choose another run_dir")
    if least.free_bytes < count * one:
        return Finding("disk", WARN, measured, "make room or set train.keep_last_checkpoints")
    speed = f"written at {amount(slowest.write_bytes_per_second, 'B/s')} by the slowest host"
    return Finding("disk", OK, f"{measured}, {speed}")
