"""A trace: valid, of the steps that were asked for, and silent."""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from tostlm.launch import RankInfo
from tostlm.train.profiler import StepProfiler, _drop_profiler_messages
from tostlm.tssa import tssa


def trace(run: Run, steps: Iterable[int], rank: int = 0) -> None:
    run.dir.mkdir(exist_ok=True)
    with StepProfiler(run.config("train.profile_steps=[3,4]"), RankInfo(rank, rank, 2)) as tracer:
        for step in steps:
            with tracer.step(step):
                w = torch.randn(1, 40, 8, requires_grad=True)
                tssa(w, torch.ones(2))[0].sum().backward()


def names(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in ("cpu_op", "user_annotation")]


def steps_of(path: Path) -> list[str]:
    return [name for name in names(path) if name.startswith("ProfilerStep#")]


@pytest.mark.parametrize(
    ("steps", "traced"), [(range(1, 7), (3, 4)), (range(1, 4), (3, 3)), (range(4, 7), (4, 4))], ids=str
)
def test_the_trace_names_the_steps_and_the_operator(
    run: Run, steps: range, traced: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    trace(run, steps)
    first, last = traced
    (path,) = (run.dir / "trace").iterdir()
    assert path.name == f"steps-{first}-{last}.pt.trace.json.gz"
    assert steps_of(path) == [f"ProfilerStep#{step}" for step in range(first, last + 1)]
    assert {"tostlm_tssa_operator::forward", "tostlm_tssa_operator::backward"} <= set(names(path))
    assert capfd.readouterr() == ("", "")


def test_a_step_is_traced_once_even_after_a_rollback(run: Run) -> None:
    trace(run, [2, 3, 4, 5, 3, 4, 5])
    (path,) = (run.dir / "trace").iterdir()
    assert steps_of(path) == ["ProfilerStep#3", "ProfilerStep#4"]


@pytest.mark.parametrize(("steps", "rank"), [(range(1, 3), 0), (range(5, 7), 0), (range(1, 7), 1)], ids=str)
def test_steps_not_come_by_and_other_ranks_leave_none(run: Run, steps: range, rank: int) -> None:
    trace(run, steps, rank)
    assert not (run.dir / "trace").exists()


def test_what_others_say_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with _drop_profiler_messages():
        os.write(2, b"USDT:2026 profiler_start\nNCCL has something to say\n")
    assert capfd.readouterr().err == "NCCL has something to say\n"
