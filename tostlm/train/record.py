"""Where a run's numbers go: metrics.jsonl, TensorBoard and, where it is asked for, Weights & Biases."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tostlm.config import RunConfig
from tostlm.files import write_atomically
from tostlm.train.wandb import WandbRun

EVENT = "event"


class MetricsWriter:
    """What a run writes down, each step once. A number that is not finite is null in metrics.jsonl, and nowhere else.

    Opening or rewinding it to a step forgets what was written beyond, but for the events.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self._run_dir, self._batch_tokens = config.run_dir, config.train.batch_tokens
        project = config.train.wandb_project
        self._wandb = WandbRun(config, project) if project is not None else None
        self._open(step)

    def _open(self, step: int) -> None:
        path = self._run_dir / "metrics.jsonl"
        _drop_after(path, step)
        self._file = path.open("a")
        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1)

    def _close(self) -> None:
        self._file.close()
        self._board.close()

    def rewind(self, step: int) -> None:
        """Go on from after `step`."""
        self._close()
        self._open(step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._close()
        if self._wandb is not None:
            self._wandb.close(failed)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a kind at a step, for good before it returns."""
        self._line(kind, step, values)
        finite = {f"{kind}/{name}": value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()  # a run that is killed would lose what waits in its queue
        if self._wandb is not None:
            self._wandb.write(step, finite)

    def event(self, step: int, what: str, values: Mapping[str, object]) -> None:
        """Write that something happened after `step`, in metrics.jsonl alone."""
        self._line(EVENT, step, {"what": what, **values})

    def _line(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        place = {"kind": kind, "step": step, "tokens": step * self._batch_tokens, "time": time.time()}
        entry = {name: None if _is_no_number(value) else value for name, value in values.items()}
        self._file.write(json.dumps({**place, **entry}, allow_nan=False) + "\n")
        self._file.flush()


def _is_no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text().splitlines()
        write_atomically(path, "".join(f"{line}\n" for line in lines if _stays(line, step)))


def _stays(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return entry["kind"] == EVENT or entry["step"] <= step
    except (ValueError, TypeError, LookupError):  # a line cut short by a crash, or none of ours
        return False
