"""What `tostlm bench` does."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from tostlm.bench.training import bench_training, table
from tostlm.config import load_config
from tostlm.files import distinct_names, require_file_writable, write_atomically


def training(
    configs: Sequence[Path],
    contexts: Sequence[int],
    tokens: int,
    repeats: int,
    threads: int | None,
    out: Path | None,
) -> str:
    """Time the models of some configs, write the rates to `out`, return the table."""
    if threads:
        torch.set_num_threads(threads)
    if out:
        require_file_writable(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = dict(zip(distinct_names(configs), map(load_config, configs), strict=True))
    rates = bench_training(runs, contexts, tokens, repeats, device)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": tokens,
        "repeats": repeats,
    }
    if out:
        write_atomically(out, json.dumps({**machine, "rates": [rate._asdict() for rate in rates]}, indent=2) + "\n")
    return f"{table(rates)}\n{machine['device']}, {machine['threads']} threads, torch {torch.__version__}"
