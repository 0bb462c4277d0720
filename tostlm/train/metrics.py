"""What a run reports: a record of numbers, a line or a bar on the terminal."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm

from tostlm.config import RunConfig
from tostlm.launch import RankInfo
from tostlm.model import best_device, training_flops_per_token
from tostlm.train.clock import PhaseTimers
from tostlm.train.record import MetricsWriter

# Dense bf16 operations a second, from the vendors' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}
ASIDE = ("eval", "save", "statistics")  # phases that are no training


class Metrics:
    """A run's report. Rank 0 writes it, the other ranks' are mute; a resumed run goes on without doubled steps.

    `clock` splits the time of a rank: the loop tells it the phases data, forward, backward, step, eval, save and
    statistics. Seconds and memory are rank 0's.
    """

    def __init__(self, config: RunConfig, start_step: int, ranks: RankInfo) -> None:
        self._config, self._world_size = config, ranks.world_size
        self._mute = ranks.rank != 0
        if not self._mute:
            self._record = MetricsWriter(config, start_step)
            self._bar = tqdm(
                total=config.train.steps,
                initial=start_step,
                desc="train",
                unit=" steps",
                disable=not sys.stderr.isatty(),
            )
            self._on_bar: dict[str, str] = {}
        self._reported_step = start_step
        self.clock = PhaseTimers(best_device())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._mute:
            self._bar.close()
            self._record.close(failed=error is not None)

    def train(
        self,
        step: int,
        loss: float,
        lr: Mapping[str, float],
        grad_norm: Tensor | float | None,
        context: int,
        epochs: Mapping[str, float],
        skipped_steps: int = 0,
    ) -> None:
        """Report a step.

        Args:
            step: steps done.
            loss: of that step, in nats a token.
            lr: learning rate of each optimizer group, by name.
            grad_norm: before clipping; None where it is not known.
            context: tokens of a window.
            epochs: how often each set, by name, has been read by then.
            skipped_steps: steps so far whose update was not made.
        """
        seconds, steps = self.clock.report(), step - self._reported_step
        self._reported_step = step
        if self._mute:
            return
        values = {
            "loss": loss,
            "perplexity": _perplexity(loss),
            "lr": max(lr.values()),
            **{f"lr/{name}": rate for name, rate in lr.items()},
            **({} if grad_norm is None else {"grad_norm": float(grad_norm)}),
            **{f"epoch/{name}" if len(epochs) > 1 else "epoch": value for name, value in epochs.items()},
            "tokens": step * self._config.train.batch_tokens,
            "skipped_steps": skipped_steps,
            **self._speed(steps, seconds, context),
            **{f"seconds/{phase}": each / steps for phase, each in seconds.items()},
            "memory_bytes": _memory_bytes(),
        }
        if "save" in self.clock.last:
            values["save_seconds"] = self.clock.last["save"]
        self._record.scalars("train", step, values)
        norm, speed = values.get("grad_norm", math.nan), values["tokens_per_second"]
        skipped = f"  skipped {skipped_steps}" if skipped_steps else ""
        self._say(step, f"loss {loss:.4f}  lr {values['lr']:.2e}  grad {norm:.2f}  {speed:,.0f} tokens/s{skipped}")
        self._show(step, loss=f"{loss:.4f}", **({"skipped": str(skipped_steps)} if skipped_steps else {}))

    def _speed(self, steps: int, seconds: Mapping[str, float], context: int) -> dict[str, float]:
        """Of training alone: evaluations, saves and statistics are left out."""
        training = sum(each for phase, each in seconds.items() if phase not in ASIDE)
        tokens_per_second = steps * self._config.train.batch_tokens / training
        speed = {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / self._world_size,
        }
        if peak := _peak_flops():
            flops = training_flops_per_token(self._config.model, context)
            speed["mfu"] = tokens_per_second * flops / (peak * self._world_size)
        return speed

    def heldout(self, step: int, loss: float) -> None:
        """Report an evaluation on held-out text: its loss in nats a token."""
        if self._mute:
            return
        self._record.scalars("heldout", step, {"loss": loss, "perplexity": _perplexity(loss)})
        self._say(step, f"held-out loss {loss:.4f}")
        self._show(step, heldout=f"{loss:.4f}")

    def statistics(self, step: int, values: Mapping[str, float]) -> None:
        """Report what the layers do, by name; see `tostlm.train.statistics`. Without TSSA there is nothing to say."""
        if not self._mute and values:
            self._record.scalars("statistics", step, values)

    def event(self, step: int, what: str, **values: object) -> None:
        """Report that something happened after `step` steps. It stays on record, whatever step the run goes back to."""
        if self._mute:
            return
        self._record.event(step, what, values)
        self._say(step, "  ".join([what, *(f"{name} {value}" for name, value in values.items())]))

    def rewind(self, step: int) -> None:
        """Go back to after `step`: what was reported of later steps is forgotten, but for events."""
        self.clock.report()
        self._reported_step = step
        if not self._mute:
            self._record.rewind(step)
            self._show(step)

    def _say(self, step: int, line: str) -> None:
        tqdm.write(f"step {step}/{self._config.train.steps}  {line}", file=sys.stdout)
        sys.stdout.flush()

    def _show(self, step: int, **values: str) -> None:
        self._on_bar |= values
        self._bar.set_postfix(self._on_bar, refresh=False)
        self._bar.n = step
        self._bar.refresh()


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def _memory_bytes() -> int:
    """Peak memory of this process, on its device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)
