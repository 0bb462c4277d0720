"""What the benchmarks share: the clock, and the report with the machine it was made on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from tostlm import __version__
from tostlm.device import device_name
from tostlm.files import write_atomically


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(table: str, device: torch.device, out: Path | None, **results: object) -> str:
    """Return a table above a line about the machine; write `results` and that line to `out`, a .json file."""
    threads = torch.get_num_threads()
    machine = f"{device_name(device)}, {threads} threads, torch {torch.__version__}, tostlm {__version__}"
    if out:
        write_atomically(out, json.dumps({"machine": machine, **results}, indent=2) + "\n")
    return f"{table}\n{machine}"
