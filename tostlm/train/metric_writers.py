"""Where a run's numbers are written: metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tostlm.config import RunConfig
from tostlm.errors import UserError, error_summary
from tostlm.files import write_atomically

EVENT = "event"  # the kind of the lines that a rollback keeps
WANDB_START_SECONDS, WANDB_END_SECONDS = 60, 60  # how long the service may delay a run

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes a run's numbers to every destination, each step once.

    Opening a writer after `step` steps, or rewinding it, removes what was written of later steps, except events. A
    number that is not finite is null in metrics.jsonl and missing elsewhere.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self._run_dir, self._batch_tokens = config.run_dir, config.train.batch_tokens
        self._wandb = WandbRun(config)
        self._open(step)

    def _open(self, step: int) -> None:
        path = self._run_dir / "metrics.jsonl"
        _remove_later_lines(path, step)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1)

    def _close_files(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def rewind(self, step: int) -> None:
        """Continue after `step`, without what was written of later steps."""
        self._close_files()
        self._open(step)

    def close(self, failed: bool) -> None:
        """Write what is buffered and close all destinations; `failed` marks the run so in Weights & Biases."""
        self._close_files()
        self._wandb.close(failed)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write values of a kind (train, validation, statistics, event) at a step; they are flushed when this returns.

        Events go to metrics.jsonl alone; all other values are numbers.
        """
        header = {"kind": kind, "step": step, "tokens": step * self._batch_tokens, "time": time.time()}
        finite = {name: x for name, x in values.items() if not isinstance(x, float) or math.isfinite(x)}
        self._file.write(json.dumps({**header, **dict.fromkeys(values), **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if kind == EVENT:
            return
        scalars = {f"{kind}/{name}": value for name, value in finite.items()}
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()  # a run that is killed would lose its queue
        self._wandb.write(step, scalars)


def _remove_later_lines(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text().splitlines()
        write_atomically(path, "".join(f"{line}\n" for line in lines if _is_kept(line, step)))


def _is_kept(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return bool(entry["kind"] == EVENT or entry["step"] <= step)
    except (ValueError, TypeError, LookupError):  # cut short by a crash, or not written by tostlm
        return False


def check_wandb(config: RunConfig) -> None:
    """Check that Weights & Biases can be used, if `train.wandb_project` is set.

    Raises:
        UserError: the library or its API key is missing.
    """
    if config.train.wandb_project is None:
        return
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"train.wandb_project {config.train.wandb_project} needs Weights & Biases; pip install 'tostlm[wandb]', or "
            "remove the key"
        ) from None
    online = wandb.setup(wandb.Settings(silent=True)).settings.mode == "online"
    if online and not wandb.login(verify=False, prompt=False):
        raise UserError(
            f"train.wandb_project {config.train.wandb_project} needs an API key of Weights & Biases; run `wandb "
            "login`, set WANDB_API_KEY, or write to disk alone with WANDB_MODE=offline"
        )


class WandbRun:
    """Sends scalars to Weights & Biases if `train.wandb_project` is set. No failure of the service stops the run.

    A resumed run continues under the same W&B id, which its folder keeps. Nothing can be removed there: after a
    rollback W&B has some steps twice.
    """

    def __init__(self, config: RunConfig) -> None:
        self._run: Any = None
        if config.train.wandb_project is None:
            return
        import wandb

        with self._ignore_failures():
            id_file = config.run_dir / "wandb" / "id"
            if not id_file.exists():
                write_atomically(id_file, secrets.token_hex(8))
            self._run = wandb.init(
                project=config.train.wandb_project,
                name=config.run_dir.name,
                id=id_file.read_text(),
                resume="allow",
                dir=config.run_dir,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_END_SECONDS
                ),
            )
            self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send scalars by name."""
        if self._run is not None:
            with self._ignore_failures():
                self._run.log({"step": step, **scalars})

    def close(self, failed: bool) -> None:
        """Send what is buffered and end the W&B run."""
        if self._run is not None:
            with self._ignore_failures():
                self._run.finish(exit_code=int(failed))

    @contextmanager
    def _ignore_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the service, the network or wandb's own processes
            self._run = None
            log.warning("the run continues without Weights & Biases: %s", error_summary(error))
