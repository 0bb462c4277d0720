"""Training steps of models side by side, at growing contexts: speed and memory."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tostlm.bench.contenders import Contender, open_contenders
from tostlm.bench.report import begin, clock, free_bytes, report, take_turns
from tostlm.device import best_device
from tostlm.errors import is_out_of_memory
from tostlm.files import aligned, format_bytes
from tostlm.plan.trace import TRACED_TOKENS, LiveBytes

NONE = "-"


class Rate(NamedTuple):
    """What a step of one model costs at one context; numbers are None where it could not be made."""

    model: str
    context: int
    tokens: int  # of a step
    tokens_per_second: float | None = None  # of whole steps, the median of interleaved ones
    pass_tokens_per_second: float | None = None  # of passes forward and back alone
    peak_bytes: int | None = None  # of tensors, with weights and optimizer, at most during a step
    saved_bytes: int | None = None  # of tensors, from the forward pass to the backward pass
    failure: str | None = None  # why it could not be made


def report_training(
    models: Sequence[str],
    contexts: Sequence[int],
    tokens: int,
    repeats: int,
    threads: int | None,
    compiled: bool,
    out: Path | None,
) -> str:
    """Time models by `bench_training` and return the table of what they cost; `models` as in `open_contenders`.

    `out`, a .json file, is written after every context, so that a benchmark that is ended keeps what it has.

    Raises:
        UserError: a model is unknown, or the file cannot be written.
    """
    begin(threads, out)
    contenders, device = open_contenders(models, compiled), best_device()
    rates: list[Rate] = []
    for found in bench_training(contenders, contexts, tokens, repeats, device):
        rates += found
        rows = [rate._asdict() for rate in rates]
        text = report(table(rates), device, out, tokens=tokens, repeats=repeats, rates=rows)
    return text


def bench_training(
    contenders: Mapping[str, Contender], contexts: Sequence[int], tokens: int, repeats: int, device: torch.device
) -> Iterator[list[Rate]]:
    """Yield, for each context, what training steps of several models cost: forward, backward and AdamW's update.

    The models take turns, step by step, so that a change of the machine's speed meets all of them. A CPU's one thread
    is timed by its own seconds. Position tables are made as long as the context.

    Args:
        contenders: by the name to report.
        tokens: of a step; one context where that is longer.
        repeats: timed steps per model and context, after one that warms up.
    """
    for context in contexts:
        sequences = max(1, tokens // context)
        failures = _too_large(contenders, sequences, context, device)
        steps = {
            name: _Step(contender, sequences, context, device)
            for name, contender in contenders.items()
            if name not in failures
        }
        memory = {name: step.memory() for name, step in steps.items() if step.runs()}
        timed = take_turns({name: partial(steps[name].time) for name in memory}, repeats) if memory else {}
        rates, size = [], sequences * context
        for name in contenders:
            if name in timed:
                passed, whole = (statistics.median(times) for times in zip(*timed[name], strict=True))
                rates.append(Rate(name, context, size, size / whole, size / passed, *memory[name]))
            else:
                rates.append(Rate(name, context, size, failure=failures.get(name, "out of memory")))
        yield rates


class _Step:
    """Training steps of one model on tokens of chance, once it `runs`; without `data` on those that take no memory."""

    def __init__(
        self, contender: Contender, sequences: int, context: int, device: torch.device, data: bool = True
    ) -> None:
        self._contender, self._device, self._data = contender, device, data
        self._sequences, self._context = sequences, context
        self._module = nn.Module()
        self._optimizer: torch.optim.Optimizer

    def runs(self) -> bool:
        """Make the model, and a step that warms up; return whether there was memory for them."""
        try:
            with self._device:
                self._module = self._contender.create(self._context, self._data)
            fused = self._device.type == "cuda"
            self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=1e-6, fused=fused)
            self.time()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._module = nn.Module()  # and the memory of the other goes
            return False
        return True

    def time(self) -> tuple[float, float]:
        """Return the seconds of a step's passes, and of the whole step."""
        inputs, targets = self._batch()
        start = clock(self._device)
        self._loss(inputs, targets).backward()
        passed = clock(self._device) - start
        self._optimizer.step()
        self._optimizer.zero_grad()
        return passed, clock(self._device) - start

    def memory(self) -> tuple[int, int]:
        """Return the most bytes that tensors take in a step, and those that it keeps for its backward pass."""
        batch = self._batch()
        with LiveBytes([*self._state(), *batch]) as live:
            loss = self._loss(*batch)
            saved = live.bytes
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return live.peak + self.state_bytes(), saved

    def state_bytes(self) -> int:
        """Return the bytes that stay between steps: weights and moments."""
        return sum(each.nbytes for each in self._state())

    def _state(self) -> list[Tensor]:
        moments = (each for state in self._optimizer.state.values() for each in state.values())
        return [*self._module.parameters(), *self._module.buffers(), *(m for m in moments if isinstance(m, Tensor))]

    def _batch(self) -> tuple[Tensor, Tensor]:
        shape = self._sequences, self._context + 1
        tokens = torch.randint(self._contender.vocab_size, shape, device=self._device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._contender.autocast(self._device):
            return self._contender.loss(self._module, inputs, targets)


def _too_large(
    contenders: Mapping[str, Contender], sequences: int, context: int, device: torch.device
) -> dict[str, str]:
    """Return why models do not fit into the memory that is free, all of them at once, by name.

    Each makes steps on tensors without data, which take no memory; a longer context takes at as many tokens what one of
    TRACED_TOKENS does.
    """
    free, traced = free_bytes(device), min(context, TRACED_TOKENS)
    peaks, states = {}, {}
    for name, contender in contenders.items():
        with FakeTensorMode():
            step = _Step(contender, sequences * context // traced, traced, torch.device("cpu"), data=False)
            step.runs()
            peaks[name], states[name] = step.memory()[0], step.state_bytes()
    beside = sum(states.values())
    needs = {name: peak + beside - states[name] for name, peak in peaks.items()}
    return {
        name: f"needs {format_bytes(need)}, {format_bytes(free)} are free"
        for name, need in needs.items()
        if need > free
    }


def table(rates: Sequence[Rate]) -> str:
    """Return a table: tokens per second, how much faster the first model is, and memory, by context and model."""
    rows = [["context", "model", "tokens/s", "first / it", "peak", "saved"]]
    for context, group in itertools.groupby(rates, lambda rate: rate.context):
        own = list(group)
        first = own[0].tokens_per_second
        for rate in own:
            speed, peak, saved = rate.tokens_per_second, rate.peak_bytes, rate.saved_bytes
            if speed is None or peak is None or saved is None:
                rows.append([str(context), rate.model, rate.failure or "", "", "", ""])
                continue
            ratio = NONE if first is None else f"{first / speed:.2f}x"
            rows.append([str(context), rate.model, f"{speed:,.0f}", ratio, format_bytes(peak), format_bytes(saved)])
    return aligned(rows, left=(1,))
