"""Decoding side by side: what a token costs after contexts of growing lengths, and the memory that a context takes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tostlm.bench.report import now, report
from tostlm.config import load_config
from tostlm.device import best_device
from tostlm.eval import Sampling, Writer
from tostlm.files import distinct_names, require_file_writable
from tostlm.model import LM, ModelConfig, create_lm


class Decoding(NamedTuple):
    """What decoding costs one model after one context: medians of interleaved steps."""

    model: str
    context: int
    milliseconds: float  # of a token: the forward pass alone
    generate_milliseconds: float  # of a token that is drawn too, as `tostlm generate` does
    prefill_tokens_per_second: float
    state_bytes: int  # of a sequence


def report_decoding(
    configs: Sequence[Path], contexts: Sequence[int], tokens: int, batch: int, threads: int | None, out: Path | None
) -> str:
    """Time the models of some configs by `bench_decoding` and return the table of their times.

    Args:
        configs: files of run configs, or names of shipped ones.
        threads: of torch on the CPU; None leaves its default.
        out: a .json file to write the times to as well.
    """
    if threads:
        torch.set_num_threads(threads)
    if out:
        require_file_writable(out)
    device = best_device()
    models = {name: load_config(path).model for name, path in zip(distinct_names(configs), configs, strict=True)}
    found = bench_decoding(models, contexts, tokens, batch, device)
    rows = [decoding._asdict() for decoding in found]
    return report(table(found), device, out, tokens=tokens, batch=batch, decode=rows)


def bench_decoding(
    models: Mapping[str, ModelConfig], contexts: Sequence[int], tokens: int, batch: int, device: torch.device
) -> list[Decoding]:
    """Time how several models read a context of random tokens and then write tokens, one by one, in fp32.

    The models take turns, token by token, so that a change of the machine's speed meets all of them. Position tables
    are made long enough.

    Args:
        models: by the name to report.
        tokens: written after each context, after one that warms up.
        batch: sequences that are written together.
    """
    found = []
    for context in contexts:
        writers, seconds = {}, {}
        for name, config in models.items():
            writers[name] = writer = _Timed(config, context + tokens + 1, batch, device)
            seconds[name] = writer.read(context)
        steps = [{name: writer.step() for name, writer in writers.items()} for _ in range(tokens + 1)][1:]
        for name, writer in writers.items():
            forward, written = zip(*(step[name] for step in steps), strict=True)
            times = (statistics.median(forward) * 1000, statistics.median(written) * 1000)
            found.append(Decoding(name, context, *times, batch * context / seconds[name], writer.state_bytes // batch))
    return found


class _Timed:
    """A model that reads and writes random tokens, and says in how many seconds."""

    def __init__(self, config: ModelConfig, positions: int, batch: int, device: torch.device) -> None:
        self._lm: LM = create_lm(replace(config, positions=config.positions and positions), seed=0).to(device).eval()
        self._device, self._batch, self._vocab_size = device, batch, config.vocab_size
        self._writer = Writer(self._lm, config.vocab_size, Sampling(), range(batch))

    def read(self, context: int) -> float:
        tokens = torch.randint(self._vocab_size, (self._batch, context), device=self._device)
        start = now(self._device)
        self._writer.read(tokens)
        return now(self._device) - start

    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """Return the time of the forward pass alone, and that of the same one with drawing a token."""
        start = now(self._device)
        x, _ = self._lm.hidden(self._writer.pending, self._writer.state)
        self._lm.logits(x[:, -1:])
        middle = now(self._device)
        self._writer.write()
        return middle - start, now(self._device) - middle

    @property
    def state_bytes(self) -> int:
        return self._writer.state.nbytes if self._writer.state else 0


def table(found: Sequence[Decoding]) -> str:
    """Return a table by context: milliseconds a token, how many times the first model's, and bytes of the state."""
    names = list(dict.fromkeys(decoding.model for decoding in found))
    lines = [f"{'context':>8}" + "".join(f"{name:>44}" for name in names)]
    for context, group in itertools.groupby(found, lambda decoding: decoding.context):
        decodings = list(group)
        lines.append(f"{context:>8}" + "".join(f"{_cell(decoding, decodings[0]):>44}" for decoding in decodings))
    return "\n".join([f"{lines[0]}   ms/token (x the first; generate), state", *lines[1:]])


def _cell(decoding: Decoding, first: Decoding) -> str:
    ratio = decoding.milliseconds / first.milliseconds
    drawn = decoding.generate_milliseconds / decoding.milliseconds
    return f"{decoding.milliseconds:.2f} ({ratio:.2f}x; {drawn:.2f}x), {decoding.state_bytes / 1024:,.0f} KiB"
