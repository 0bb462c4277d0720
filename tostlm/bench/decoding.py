"""Decoding side by side: what a token costs after contexts of growing lengths, and the memory that a context takes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tostlm.bench.report import now, open_configs, report
from tostlm.device import best_device
from tostlm.eval import Sampling, Writer
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
    """Time the models of some configs by `bench_decoding` and return the table of their times; see `open_configs`."""
    models = {name: run.model for name, run in open_configs(configs, threads, out).items()}
    device = best_device()
    found = bench_decoding(models, contexts, tokens, batch, device)
    rows = [decoding._asdict() for decoding in found]
    return report(table(found), device, out, tokens=tokens, batch=batch, decode=rows)


def bench_decoding(
    models: Mapping[str, ModelConfig], contexts: Sequence[int], tokens: int, batch: int, device: torch.device
) -> list[Decoding]:
    """Time how several models read contexts of random tokens and then write tokens, one by one, in fp32.

    All contexts of all models take turns, token by token, so that a change of the machine's speed meets all of them.
    Position tables are made long enough.

    Args:
        models: by the name to report.
        tokens: written after each context, after one that warms up.
        batch: sequences that are written together.
    """
    longest, lms = max(contexts) + tokens + 1, {}
    for name, config in models.items():
        lms[name] = create_lm(replace(config, positions=config.positions and longest), seed=0).to(device).eval()
    cases = {(name, context): _Case(lm, context, batch) for context in contexts for name, lm in lms.items()}
    steps = [{case: timed.step() for case, timed in cases.items()} for _ in range(tokens + 1)][1:]
    found = []
    for (name, context), timed in cases.items():
        forward, written = zip(*(step[name, context] for step in steps), strict=True)
        times = (statistics.median(forward) * 1000, statistics.median(written) * 1000)
        found.append(Decoding(name, context, *times, batch * context / timed.read_seconds, timed.state_bytes // batch))
    return found


class _Case:
    """A model that has read a context of random tokens, and in how many seconds."""

    def __init__(self, lm: LM, context: int, batch: int) -> None:
        self._lm, self._device = lm, lm.embed.weight.device
        vocab_size = lm.config.vocab_size
        self._writer = Writer(lm, vocab_size, Sampling(), range(batch))
        tokens = torch.randint(vocab_size, (batch, context), device=self._device)
        start = now(self._device)
        self._writer.read(tokens)
        self.read_seconds = now(self._device) - start

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
