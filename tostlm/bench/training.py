"""Training throughput of models side by side at growing contexts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tostlm.bench.report import now, open_configs, report, take_turns
from tostlm.config import RunConfig, matmul_dtype
from tostlm.device import best_device
from tostlm.model import LM, ModelConfig, create_lm


class Rate(NamedTuple):
    """Throughput of one model at one context: the median of interleaved passes."""

    model: str
    context: int
    tokens_per_second: float


def report_training(
    configs: Sequence[Path], contexts: Sequence[int], tokens: int, repeats: int, threads: int | None, out: Path | None
) -> str:
    """Time the models of some configs by `bench_training` and return the table of their speeds; see `open_configs`."""
    runs, device = open_configs(configs, threads, out), best_device()
    rates = bench_training(runs, contexts, tokens, repeats, device)
    rows = [rate._asdict() for rate in rates]
    return report(table(rates), device, out, tokens=tokens, repeats=repeats, rates=rows)


def bench_training(
    runs: Mapping[str, RunConfig], contexts: Sequence[int], tokens: int, repeats: int, device: torch.device
) -> list[Rate]:
    """Time forward and backward passes of several models, without the optimizer.

    The models take turns, pass by pass, so that a change of the machine's speed meets all of them. Position tables are
    made as long as the context. Products are in the run's dtype, weights in fp32.

    Args:
        runs: run configs by the name to report.
        tokens: tokens per pass; one context where that is longer.
        repeats: timed passes per model and context, after one that warms up.
    """
    rates = []
    for context in contexts:
        lms = {name: _model(run.model, context, device) for name, run in runs.items()}
        sequences = max(1, tokens // context)
        passes = {
            name: partial(_time_pass, lm, matmul_dtype(runs[name]), sequences, context) for name, lm in lms.items()
        }
        for name, timed in take_turns(passes, repeats).items():
            rates.append(Rate(name, context, sequences * context / statistics.median(timed)))
    return rates


def _model(config: ModelConfig, context: int, device: torch.device) -> LM:
    positions = None if config.positions is None else context
    return create_lm(replace(config, positions=positions), seed=0).to(device)


def _time_pass(lm: LM, dtype: torch.dtype, sequences: int, context: int) -> float:
    device = lm.embed.weight.device
    tokens = torch.randint(lm.config.vocab_size, (sequences, context + 1), device=device)
    start = now(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss, _ = lm(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    elapsed = now(device) - start
    lm.zero_grad()
    return elapsed


def table(rates: Sequence[Rate]) -> str:
    """Return a table of tokens per second by context, and the first model's speed divided by each other's."""
    names = list(dict.fromkeys(rate.model for rate in rates))
    rows = [["context", *names, *(f"{names[0]} / {name}" for name in names[1:])]]
    for context, group in itertools.groupby(rates, lambda rate: rate.context):
        speeds = [rate.tokens_per_second for rate in group]
        ratios = [f"{speeds[0] / speed:.2f}x" for speed in speeds[1:]]
        rows.append([str(context), *(f"{speed:,.0f}" for speed in speeds), *ratios])
    widths = [8, *(max(16, len(column) + 2) for column in rows[0][1:])]
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{lines[0]}   tokens/s, forward and backward", *lines[1:]])
