"""A profiler trace of a few steps, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import profile, record_function

from tostlm.config import RunConfig
from tostlm.launch import RankInfo


class StepProfiler:
    """Traces the steps of `train.profile_steps` on rank 0, once a process, into `run_dir/trace/`.

    A context manager: at exit it writes the trace of a run that ends between those steps. Other steps cost nothing.
    """

    def __init__(self, config: RunConfig, ranks: RankInfo) -> None:
        self._folder = config.run_dir / "trace"
        self._requested_steps = range(0)
        if config.train.profile_steps is not None and ranks.rank == 0:
            first, last = config.train.profile_steps
            self._requested_steps = range(first, last + 1)
        self._traced_steps: list[int] = []
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._write()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace the code inside as a step, if that step is requested."""
        if step not in self._requested_steps:
            yield
            return
        if self._profile is None:
            self._profile = profile()
            with _drop_profiler_messages():
                self._profile.start()
        self._traced_steps.append(step)
        with record_function(f"ProfilerStep#{step}"):  # the name that trace viewers recognize
            yield
        if step == self._requested_steps[-1]:
            self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        with _drop_profiler_messages():
            self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{self._traced_steps[0]}-{self._traced_steps[-1]}.pt.trace.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile, self._requested_steps = None, range(0)


@contextmanager
def _drop_profiler_messages() -> Iterator[None]:
    """Drop the "USDT: ..." lines that the profiler's C++ writes to stderr at any log level; keep all other lines."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)
