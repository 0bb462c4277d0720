"""What `tostlm bench` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tostlm import __version__
from tostlm.bench.data import bench_data
from tostlm.bench.data import table as data_table
from tostlm.bench.operator import DTYPES, Shape, bench_operator, plot
from tostlm.bench.operator import table as operator_table
from tostlm.bench.training import bench_training, table
from tostlm.config import load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.files import distinct_names, require_file_writable, write_atomically
from tostlm.model import best_device, device_name


def operator(
    shapes: str, tokens: Sequence[int], dtypes: str, backends: str, repeats: int, threads: int, out: Path | None
) -> str:
    """Time the operator's backends, write the timings to OUT.json, .txt and .png, return the table.

    Raises:
        UserError: a shape, dtype or backend is not one.
    """
    device = best_device()
    pairs = [_width_and_heads(shape) for shape in shapes.split(",")]
    unknown = set(dtypes.split(",")) - set(DTYPES.values())
    if unknown:
        raise UserError(f"--dtypes {unknown.pop()} is not known; use {', '.join(DTYPES.values())}")
    kinds = [dtype for dtype, name in DTYPES.items() if name in dtypes.split(",")]
    names = backends.split(",") if backends else ["torch", "triton" if device.type == "cuda" else "cpp"]
    if out:
        require_file_writable(out)
    torch.set_num_threads(threads)
    cases = [Shape(*pair, length, kind) for pair in pairs for kind in kinds for length in tokens]
    try:
        timings = bench_operator(cases, names, repeats, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    text = f"{operator_table(timings, names)}\n{_machine(device)}"
    if out:
        rows = [{**t._asdict(), "shape": {**t.shape._asdict(), "dtype": DTYPES[t.shape.dtype]}} for t in timings]
        write_atomically(out.with_suffix(".json"), json.dumps({"machine": _machine(device), "timings": rows}) + "\n")
        write_atomically(out.with_suffix(".txt"), text + "\n")
        write_atomically(out.with_suffix(".png"), plot(timings, names))
    return text


def _width_and_heads(shape: str) -> tuple[int, int]:
    width, _, heads = shape.partition("x")
    if not (width.isdigit() and heads.isdigit() and int(heads) and int(width) % int(heads) == 0):
        raise UserError(f"--shapes {shape} must be WIDTHxHEADS, the heads dividing the width, as in 768x12")
    return int(width), int(heads)


def _machine(device: torch.device) -> str:
    """What timings were taken on, in a line."""
    return f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, tostlm {__version__}"


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
    device = best_device()
    runs = dict(zip(distinct_names(configs), map(load_config, configs), strict=True))
    rates = bench_training(runs, contexts, tokens, repeats, device)
    if out:
        content = {"machine": _machine(device), "tokens": tokens, "repeats": repeats}
        rows = [rate._asdict() for rate in rates]
        write_atomically(out, json.dumps({**content, "rates": rows}, indent=2) + "\n")
    return f"{table(rates)}\n{_machine(device)}"


def data(
    sources: Sequence[str],
    tokenizer: Path,
    text_bytes: int,
    workers: int,
    context: int,
    repeats: int,
    out: Path | None,
) -> str:
    """Time preparation and loading, write the rates to `out`, return the table."""
    if out:
        require_file_writable(out)
    rates = bench_data(sources, Tokenizer.load(tokenizer), text_bytes, workers, context, repeats)
    machine = f"{device_name(torch.device('cpu'))}, tostlm {__version__}"
    if out:
        content = {"machine": machine, "workers": workers, "context": context, "repeats": repeats, **rates._asdict()}
        write_atomically(out, json.dumps(content, indent=2) + "\n")
    return f"{data_table(rates, workers)}\n{machine}"
