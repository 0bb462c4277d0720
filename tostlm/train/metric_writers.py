"""Where a run's numbers are written: metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tostlm.config import RunConfig
from tostlm.errors import UserError, error_summary
from tostlm.files import read_json_lines, write_atomically

EVENT = "event"  # the kind of the lines that a rollback keeps
AT_A_CONTEXT = re.compile(r"(.*\bloss)_at_\d+(/.*)?")  # what it is of, and of a blend the folder
WANDB_START_SECONDS, WANDB_END_SECONDS = 60, 60  # how long the service may delay a run

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes a run's numbers to every destination, each step once.

    Opening a writer after `step` steps, or rewinding it, removes what was written of later steps, except events. A
    number that is not finite is null in metrics.jsonl and missing elsewhere.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self._run_dir, self._config = config.run_dir, config
        self._wandb = WandbRun(config)
        threading.excepthook = _excepthook
        self._open(step)

    def _open(self, step: int) -> None:
        self._path, tensorboard = self._run_dir / "metrics.jsonl", self._run_dir / "tensorboard"
        _remove_later_lines(self._path, step)
        self._file = self._path.open("a")
        _sort_before_now(tensorboard)
        self._tensorboard, self._has_layout = SummaryWriter(str(tensorboard), purge_step=step + 1), False

    def _close_files(self) -> None:
        with _named(self._path):
            self._file.close()
        with _named(self._run_dir / "tensorboard"):
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

        Raises:
            OSError: with the file's name, if it cannot be written.
        """
        header = {"kind": kind, "step": step, "tokens": self._config.tokens_after(step), "time": time.time()}
        finite = {name: x for name, x in values.items() if not isinstance(x, float) or math.isfinite(x)}
        with _named(self._path):
            self._file.write(json.dumps({**header, **dict.fromkeys(values), **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if kind == EVENT:
            return
        scalars = {f"{kind}/{name}": value for name, value in finite.items()}
        with _named(self._run_dir / "tensorboard"):
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
            charts = {} if self._has_layout else context_charts(scalars)
            if charts:
                self._tensorboard.add_custom_scalars({"context": charts})
                self._has_layout = True
            self._tensorboard.flush()  # a run that is killed would lose its queue
        self._wandb.write(step, scalars)


def context_charts(tags: Iterable[str]) -> dict[str, list[Any]]:
    """Return charts for TensorBoard's custom scalars, by title: each has the losses at all contexts of one data set."""
    charts: dict[str, list[Any]] = {}
    for tag in tags:
        if match := AT_A_CONTEXT.fullmatch(tag):
            chart = charts.setdefault(f"{match[1]} by context{match[2] or ''}", ["Multiline", []])
            chart[1].append(f"{re.escape(tag)}$")  # of a tag the plugin compares the beginning with a pattern
    return charts


def _excepthook(arguments: threading.ExceptHookArgs) -> None:
    """Print what ends a thread, but for TensorBoard's, whose error its next call raises."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(arguments)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put a path into errors of writing to an open file, which have none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _sort_before_now(folder: Path) -> None:
    """Rename TensorBoard's files, which it reads in the order of the times in their names, so that a new one is last.

    It would not be after the clock was set back, and its steps would be hidden.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    if files and files[-1].name.split(".")[3] >= f"{int(time.time()):010d}":
        for number, file in enumerate(files):
            parts = file.name.split(".")
            file.rename(file.with_name(".".join([*parts[:3], f"{number:010d}", *parts[4:]])))


def _remove_later_lines(path: Path, step: int) -> None:
    """Remove the lines of later steps, except events. Lines that cannot be read go to a file beside, PATH.damaged."""
    entries, damaged = read_json_lines(path)
    kept = [entry for entry in entries if entry.get("kind") == EVENT or _step_of(entry) <= step]
    if damaged:
        with path.with_name(f"{path.name}.damaged").open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
    if entries or damaged:
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _step_of(entry: Mapping[str, Any]) -> float:
    """Return the step of a line; that of one without any is after all others."""
    step = entry.get("step")
    return step if isinstance(step, int) else math.inf


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
