"""What interrupts the steady course of a run: bad losses and requests to stop."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType

from tostlm.config import TrainConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # sent by launchers and Slurm before they end the process


class SpikeDetector:
    """Decides which steps are bad and when the run must roll back to a checkpoint.

    All ranks see the same losses, so all of them decide the same. `good_losses` are those of the last good steps in
    nats, oldest first; a run that resumes gives them from its checkpoint.
    """

    def __init__(self, train: TrainConfig, good_losses: Sequence[float] = ()) -> None:
        self._zscore, self._max_bad_steps = train.spike_zscore, train.bad_steps_before_rollback
        self.good_losses = deque(good_losses, maxlen=train.spike_window_steps if train.spike_zscore else 0)
        self._bad_in_a_row = 0
        self.rollbacks_in_a_row = 0  # without a good step after any of them

    def is_bad(self, loss: float) -> bool:
        """Return whether a loss is not finite, or is a spike compared with a full window of good steps."""
        if not math.isfinite(loss):
            return True
        if self._zscore is None or len(self.good_losses) < (self.good_losses.maxlen or 0):
            return False
        mean, deviation = statistics.fmean(self.good_losses), statistics.stdev(self.good_losses)
        return loss > mean + self._zscore * deviation

    def update(self, loss: float, bad: bool) -> bool:
        """Count a finished step and return whether the run must roll back, after too many bad steps in a row."""
        if not bad:
            self._bad_in_a_row = self.rollbacks_in_a_row = 0
            self.good_losses.append(loss)
            return False
        self._bad_in_a_row += 1
        if self._bad_in_a_row < self._max_bad_steps:
            return False
        self._bad_in_a_row, self.rollbacks_in_a_row = 0, self.rollbacks_in_a_row + 1
        return True


class StopRequest:
    """Records whether this rank was asked to stop, by a signal or by its time limit, which starts at construction.

    A context manager: it handles SIGTERM and SIGUSR1 until it exits. Ranks receive the signals at different moments,
    so `train_step` agrees on the step after which all of them stop.
    """

    def __init__(self, time_limit_minutes: float | None) -> None:
        self._deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self._signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._previous_handlers = {number: signal.signal(number, self._record_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """The signal's name, the config key of the time limit, or that another rank was asked."""
        if self._signal is not None:
            return self._signal.name
        return "train.time_limit_minutes" if self.requested else "another rank"
