"""Which steps of a run are bad, and when to go back: the same on every rank, for all see the same numbers."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from tostlm.config import TrainConfig


class SpikeDetector:
    """Judges every step's loss before its update, and counts the bad steps in a row.

    Args:
        good: losses of the last good steps, oldest first, where a run is resumed.
    """

    def __init__(self, train: TrainConfig, good: Sequence[float] = ()) -> None:
        self._zscore, self._limit = train.spike_zscore, train.bad_steps_before_rollback
        self._good = deque(good, maxlen=train.spike_window_steps if train.spike_zscore else 0)
        self._bad_in_a_row = 0
        self.rollback_failed = False  # the run has gone back, and no step since was good

    @property
    def good(self) -> tuple[float, ...]:
        """Losses of the last good steps that spikes are told by, oldest first."""
        return tuple(self._good)

    def is_bad(self, loss: float) -> bool:
        """Whether a loss is no finite number, or is a spike above those of a full window of good steps."""
        if not math.isfinite(loss):
            return True
        if self._zscore is None or len(self._good) < (self._good.maxlen or 0):
            return False
        mean, deviation = statistics.fmean(self._good), statistics.stdev(self._good)
        return loss > mean + self._zscore * deviation

    def count(self, loss: float, bad: bool) -> bool:
        """Take note of a step that is done; whether too many have been bad in a row."""
        if not bad:
            self._bad_in_a_row, self.rollback_failed = 0, False
            self._good.append(loss)
            return False
        self._bad_in_a_row += 1
        return self._bad_in_a_row >= self._limit

    def rolled_back(self) -> None:
        """Take note that the run goes on from an older step."""
        self._bad_in_a_row, self.rollback_failed = 0, True
