"""A trace of a few steps, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tostlm.config import RunConfig
from tostlm.launch import RankInfo


class StepProfiler:
    """Traces `train.profile_steps` on rank 0, once a process, into `run_dir/trace/`; other steps cost nothing.

    Steps that a run does not come by, as it ends before them or goes on after them, are not traced.
    """

    def __init__(self, config: RunConfig, ranks: RankInfo) -> None:
        self._folder = config.run_dir / "trace"
        self._wanted = range(0)
        if config.train.profile_steps is not None and ranks.rank == 0:
            first, last = config.train.profile_steps
            self._wanted = range(first, last + 1)
        self._steps: list[int] = []
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace what is inside as a step, if it is one of the wanted."""
        if step not in self._wanted:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            with _without_its_chatter():
                self._profile.start()
        self._steps.append(step)
        with record_function(f"ProfilerStep#{step}"):  # the name that readers of traces know
            yield
        if step == self._wanted[-1]:
            self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        with _without_its_chatter():
            self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self._path()))
        self._profile, self._wanted = None, range(0)

    def _path(self) -> Path:
        return self._folder / f"steps-{self._steps[0]}-{self._steps[-1]}.pt.trace.json.gz"


@contextmanager
def _without_its_chatter() -> Iterator[None]:
    """Drop the lines "USDT: ..." that the profiler's C++ writes to stderr, whatever its log level, and no others."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)
