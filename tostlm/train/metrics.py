"""What a run reports: the time of its phases, throughput, losses and layer statistics, on the terminal and in files."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function
from tqdm import tqdm

from tostlm.checkpoint import TrainState
from tostlm.config import RunConfig
from tostlm.device import best_device, peak_flops
from tostlm.launch import RankInfo
from tostlm.model import perplexity, training_flops_per_token
from tostlm.train.engine import StepResult
from tostlm.train.metric_writers import EVENT, MetricsWriter

LOSS_AT = re.compile(r"loss_at_(\d+)")  # of a validation, at another context in tokens
OTHER = "other"  # the time outside of all phases
PHASES_BESIDE_TRAINING = ("eval", "save", "statistics")  # not counted in the throughput


class PhaseTimers:
    """Divides the time between two reports into phases, without gaps or overlaps.

    A phase inside another interrupts it. On a GPU the limits of phases are events in its stream, which are read once
    they have passed: a phase lasts as long as the GPU works on it, and nothing waits before a report. `on_phase` is
    called with the name of each phase when it begins.
    """

    def __init__(self, device: torch.device, on_phase: Callable[[str], object] = lambda name: None) -> None:
        self._on_cuda, self._on_phase = device.type == "cuda", on_phase
        self._phases = [OTHER]
        self._marks = deque([(OTHER, self._now())])  # moments not yet counted, and the phase that ended at each
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}  # seconds of each phase's most recent occurrence before the last report

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the code inside as phase `name`, under which profiler traces show it too."""
        self._on_phase(name)
        self._mark()
        self._phases.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._mark()
            self._phases.pop()

    def report(self) -> dict[str, float]:
        """Return the seconds of each phase since the last report; on a GPU this waits for its work to finish."""
        self._mark()
        self._marks[-1][1].synchronize()
        self._count()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)

    def _mark(self) -> None:
        self._marks.append((self._phases[-1], self._now()))
        self._count()

    def _now(self) -> _CpuEvent | torch.cuda.Event:
        if not self._on_cuda:
            return _CpuEvent()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self) -> None:
        """Count the events that have passed, so that their number stays small between reports."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            (_, start), (name, end) = self._marks.popleft(), self._marks[0]
            self.last[name] = start.elapsed_time(end) / 1000  # type: ignore[arg-type]  # both are of one kind
            self._seconds[name] += self.last[name]


class _CpuEvent:
    """A moment on the CPU, with the methods of `torch.cuda.Event`."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: _CpuEvent) -> float:
        return 1000 * (end_event._seconds - self._seconds)


class Metrics:
    """Reports a run's numbers in files and on the terminal, as lines and as a progress bar.

    Rank 0 reports for all; on the other ranks the methods do nothing. Times and memory are those of rank 0. A context
    manager: it closes the files at exit. Numbers of steps after `start_step`, from an interrupted run, are removed.
    """

    def __init__(self, config: RunConfig, start_step: int, ranks: RankInfo, timers: PhaseTimers) -> None:
        self._config, self._world_size, self._timers = config, ranks.world_size, timers
        self._reported_step = start_step
        self._writer: MetricsWriter | None = None
        self._rewind_to: int | None = None
        if ranks.rank == 0:
            self._writer = MetricsWriter(config, start_step)
            # `disable=None` shows the bar on a terminal only.
            self._bar = tqdm(total=config.train.steps, initial=start_step, desc="train", unit=" steps", disable=None)
            self._bar_values: dict[str, str] = {}

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._writer is not None:
            self._bar.close()
            self._writer.close(failed=error is not None)

    def log(
        self,
        state: TrainState,
        result: StepResult,
        lr: float,
        groups: Sequence[Mapping[str, Any]],
        context: int,
        epochs: Mapping[str, float],
    ) -> None:
        """Report a training step on sequences of `context` tokens, after which the run is in `state`.

        `lr` is the schedule's; `groups` are the optimizer's, with a name and a learning rate each; `epochs` is how
        often each data set has been read so far, by its name.
        """
        seconds, steps = self._timers.report(), state.step - self._reported_step
        tokens = self._config.tokens_after(state.step) - self._config.tokens_after(self._reported_step)
        self._reported_step = state.step
        if self._writer is None:
            return
        skipped = state.skipped_steps
        values = {
            "loss": result.loss,
            "perplexity": perplexity(result.loss),
            "lr": lr,
            **{f"lr/{group['name']}": group["lr"] for group in groups},
            **({} if result.grad_norm is None else {"grad_norm": result.grad_norm}),
            **{f"epoch/{name}" if len(epochs) > 1 else "epoch": value for name, value in epochs.items()},
            "tokens": self._config.tokens_after(state.step),
            "skipped_steps": skipped,
            **self._throughput(tokens, seconds, context),
            **{f"seconds/{phase}": each / steps for phase, each in seconds.items()},
            "memory_bytes": _peak_memory_bytes(),
        }
        if "save" in self._timers.last:
            values["save_seconds"] = self._timers.last["save"]
        line = f"loss {result.loss:.4f}  lr {values['lr']:.2e}  grad {values.get('grad_norm', math.nan):.2f}  "
        line += f"{values['tokens_per_second']:,.0f} tokens/s" + (f"  skipped {skipped}" if skipped else "")
        bar = {"loss": f"{result.loss:.4f}", **({"skipped": str(skipped)} if skipped else {})}
        self._report("train", state.step, values, line, **bar)

    def _throughput(self, tokens: int, seconds: Mapping[str, float], context: int) -> dict[str, float]:
        """Return the throughput on so many tokens, without the time of evaluations, saves and statistics."""
        training = sum(each for phase, each in seconds.items() if phase not in PHASES_BESIDE_TRAINING)
        tokens_per_second = tokens / training
        throughput = {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / self._world_size,
        }
        if peak := peak_flops(best_device()):
            flops = training_flops_per_token(self._config.model, context)
            throughput["mfu"] = tokens_per_second * flops / (peak * self._world_size)
        return throughput

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Report an evaluation on held-out text, as `validate` returns it."""
        at = [(match[1], value) for name, value in values.items() if (match := LOSS_AT.fullmatch(name))]
        line = "  ".join([f"validation loss {values['loss']:.4f}", *(f"at {n} {loss:.4f}" for n, loss in at)])
        self._report("validation", step, values, line, validation=f"{values['loss']:.4f}")

    def statistics(self, step: int, values: Mapping[str, float]) -> None:
        """Report statistics of the layers, by name and layer."""
        self._report("statistics", step, values)

    def event(self, step: int, name: str, **values: object) -> None:
        """Report that something happened after `step` steps. Events of steps that are rolled back stay in the file."""
        line = "  ".join([name, *(f"{key} {value}" for key, value in values.items())])
        self._report(EVENT, step, {"event": name, **values}, line)

    def rewind(self, step: int) -> None:
        """Continue after `step`, from a rollback on: what was reported of later steps is removed, except events.

        It is removed when something else is reported: if the run ends before that, it resumes from another checkpoint.
        """
        self._timers.report()
        self._reported_step = self._rewind_to = step

    def _report(self, kind: str, step: int, values: Mapping[str, object], line: str = "", **bar: str) -> None:
        """Write values to the files, print a line if there is one, and update the progress bar."""
        if self._writer is None:
            return
        if self._rewind_to is not None and kind != EVENT:
            self._writer.rewind(self._rewind_to)
            self._rewind_to = None
        self._writer.write(kind, step, values)
        if line:
            tqdm.write(f"step {step}/{self._config.train.steps}  {line}", file=sys.stdout)
            sys.stdout.flush()
        self._bar_values |= bar
        self._bar.set_postfix(self._bar_values, refresh=False)
        self._bar.n = step
        self._bar.refresh()


def _peak_memory_bytes() -> int:
    """Return the peak memory of this process: on its GPU, or on the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
