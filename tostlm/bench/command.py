"""What `tostlm bench` does."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from tostlm.bench.training import bench_training, table
from tostlm.config import load_config
from tostlm.files import write_atomically


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {path.stem: load_config(path).model for path in configs}
    rates = bench_training(models, contexts, tokens, repeats, device)
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
