"""What the benchmarks share: the clock, and the report with the machine it was made on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from tostlm import __version__
from tostlm.config import RunConfig, load_config
from tostlm.device import device_name
from tostlm.files import distinct_names, require_file_writable, write_atomically

T = TypeVar("T")


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(device: torch.device) -> float:
    """Return the CPU seconds of this process, which other programs hardly change, on a CPU; else as `now`."""
    return time.process_time() if device.type == "cpu" else now(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that a device has left for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def take_turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Return what each function returned in `repeats` turns, after one that warms up.

    They take turns, so that a change of the machine's speed meets all of them.
    """
    turns = [{name: run() for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in runs}


def begin(threads: int | None, out: Path | None) -> None:
    """Let torch use so many threads, or as many as by default, and check that a file can be written at the end.

    Raises:
        UserError: it cannot.
    """
    if threads:
        torch.set_num_threads(threads)
    if out:
        require_file_writable(out)


def open_configs(configs: Sequence[Path], threads: int | None, out: Path | None) -> dict[str, RunConfig]:
    """Return run configs by the names to report, once the benchmark can begin.

    Args:
        configs: files of run configs, or names of shipped ones.
        threads: that torch is to use on the CPU; None leaves its default.
        out: a .json file that is to be written; None is none.

    Raises:
        UserError: a config is wrong, or the file cannot be written.
    """
    begin(threads, out)
    return dict(zip(distinct_names(configs), map(load_config, configs), strict=True))


def report(table: str, device: torch.device, out: Path | None, **results: object) -> str:
    """Return a table above a line about the machine; write `results` and that line to `out`, a .json file."""
    threads = torch.get_num_threads()
    machine = f"{device_name(device)}, {threads} threads, torch {torch.__version__}, tostlm {__version__}"
    if out:
        write_atomically(out, json.dumps({"machine": machine, **results}, indent=2) + "\n")
    return f"{table}\n{machine}"
