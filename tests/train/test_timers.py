"""Phase timers count all time once, and on a GPU wait for nothing before a report."""

import time

import pytest
import torch

from tostlm.train.metrics import PhaseTimers


def test_phases_share_all_the_time() -> None:
    before = time.perf_counter()
    timers = PhaseTimers(torch.device("cpu"))
    start = time.perf_counter()
    with timers("data"):
        time.sleep(0.02)
    with timers("step"):
        time.sleep(0.01)
        with timers("save"):
            time.sleep(0.04)
        time.sleep(0.01)
    time.sleep(0.03)
    end = time.perf_counter()
    seconds = timers.report()
    assert end - start <= sum(seconds.values()) <= time.perf_counter() - before
    for name, least in {"data": 0.02, "step": 0.02, "save": 0.04, "other": 0.03}.items():
        assert seconds[name] >= least
    assert timers.last["save"] == seconds["save"]
    assert timers.report().keys() == {"other"}


def test_a_phase_that_fails_ends() -> None:
    timers = PhaseTimers(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), timers("step"):
        raise ZeroDivisionError
    timers.report()
    assert timers.report().keys() == {"other"}


class Event:
    """A CUDA event on a machine without one: the stream reaches the n-th after n milliseconds, if it is waited for."""

    recorded, reached, waits = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.place = Event.recorded

    def query(self) -> bool:
        return self.place <= Event.reached

    def synchronize(self) -> None:
        Event.reached, Event.waits = self.place, Event.waits + 1

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "read before it has passed"
        return float(end.place - self.place)


def test_on_a_gpu_nothing_waits_before_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timers = PhaseTimers(torch.device("cuda"))
    for _ in range(10):
        with timers("forward"), timers("backward"):
            pass
    assert (Event.recorded, Event.waits) == (41, 0)
    Event.reached = 30  # the stream gets on by itself, and what has passed is counted and let go
    with timers("step"):
        assert len(timers._marks) == 42 - 29
    assert timers.report() == pytest.approx({"other": 12e-3, "forward": 20e-3, "backward": 10e-3, "step": 1e-3})
    assert Event.waits == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_phase_is_as_long_as_the_gpu_is_at_it() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    timers = PhaseTimers(x.device)
    start = time.perf_counter()
    with timers("forward"):
        for _ in range(50):
            x @ x
    host = time.perf_counter() - start
    with timers("step"):
        pass
    seconds = timers.report()
    assert seconds["forward"] > 2 * host
    assert seconds["step"] < 0.1 * seconds["forward"]
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - start, rel=0.1)
