"""What a run reports: metrics.jsonl, TensorBoard, a line or a bar on the terminal."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tostlm.config import RunConfig
from tostlm.files import write_atomically
from tostlm.launch import Ranks
from tostlm.model import training_flops_per_token

# Dense bf16 operations a second, from the vendors' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


class Metrics:
    """A run's record. Rank 0 writes it, the other ranks' are mute; a resumed run goes on without doubled steps."""

    def __init__(self, config: RunConfig, start_step: int, ranks: Ranks) -> None:
        self._config, self._world_size = config, ranks.world
        self._mute = ranks.rank != 0
        self.restart_clock(start_step)
        if self._mute:
            return
        path = config.run_dir / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = path.open("a")
        self._board = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=config.train.steps,
            initial=start_step,
            desc="train",
            unit=" steps",
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._mute:
            self._bar.close()
            self._board.close()
            self._file.close()

    def train(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: Tensor | float | None,
        context: int,
        epochs: Mapping[str, float],
    ) -> None:
        """Report a step of windows of `context` tokens, after which each set, by name, has been read `epochs` times.

        The tokens a second are of all since the last report.
        """
        if self._mute:
            return
        seconds = time.monotonic() - self._since
        tokens_per_second = (step - self._since_step) * self._config.train.batch_tokens / seconds
        values = {
            "loss": loss,
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "memory_bytes": _memory_bytes(),
            **{f"epoch/{name}" if len(epochs) > 1 else "epoch": value for name, value in epochs.items()},
        }
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        if peak := _peak_flops():
            flops = training_flops_per_token(self._config.model, context)
            values["mfu"] = tokens_per_second * flops / (peak * self._world_size)
        self._write("train", step, values)
        norm = values.get("grad_norm", math.nan)
        self._say(step, f"loss {loss:.4f}  lr {lr:.2e}  grad {norm:.2f}  {tokens_per_second:,.0f} tokens/s")
        self._bar.update(step - self._bar.n)
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Leave what was done since the last report, a save or an evaluation, out of the tokens a second."""
        self._since, self._since_step = time.monotonic(), step

    def heldout(self, step: int, loss: float) -> None:
        """Report an evaluation on held-out text."""
        if self._mute:
            return
        self._write("heldout", step, {"loss": loss})
        self._say(step, f"held-out loss {loss:.4f}")

    def saved(self, step: int, blocked_seconds: float) -> None:
        """Report a save, for which training stood still so long."""
        self.restart_clock(step)
        if not self._mute:
            self._write("save", step, {"blocked_seconds": blocked_seconds})

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        tokens = step * self._config.train.batch_tokens
        self._file.write(json.dumps({"kind": kind, "step": step, "tokens": tokens, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def _say(self, step: int, line: str) -> None:
        tqdm.write(f"step {step}/{self._config.train.steps}  {line}", file=sys.stdout)
        sys.stdout.flush()


def _drop_after(path: Path, step: int) -> None:
    """Forget what an interrupted run wrote beyond the checkpoint it resumes from."""
    if path.exists():
        lines = path.read_text().splitlines()
        write_atomically(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, LookupError):  # a line cut short by a crash, or none of ours
        return float("inf")


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
