"""A bad step is skipped on all ranks at every ZeRO stage."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.processes import on_ranks
from tests.train.run_helpers import zero_options
from tostlm.checkpoint.deepspeed_state import gather_weights
from tostlm.launch import RankInfo
from tostlm.train.batches import Batch, RecurrentState, open_data
from tostlm.train.engine import (
    StepResult,
    start_engine,
    train_step,
)

ACCUMULATE = "data_types.grad_accum_dtype=fp32"
CASES = [(stage, bf16, ()) for stage in (0, 1, 2, 3) for bf16 in ("false", "true")]
CASES += [(stage, "true", (f"deepspeed.{ACCUMULATE}",)) for stage in (1, 2, 3)]


class Poison(torch.autograd.Function):
    """The identity of a loss, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan


def spoilt(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda module, arguments, output: (change(output[0]), output[1])


def on_rank(run: Run, rank: int, world_size: int) -> list[dict[str, Any]]:
    return [bad_among_good(run, RankInfo(rank, rank, world_size), *case) for case in CASES]


def bad_among_good(run: Run, ranks: RankInfo, stage: int, bf16: str, more: tuple[str, ...]) -> dict[str, Any]:
    config = run.config(*zero_options(stage, bf16), *more)
    data = open_data(config, ranks.world_size)
    engine = start_engine(config, data.plan, ranks)

    recurrent_state = RecurrentState(config, data.plan.accumulation, ranks)

    def step(number: int, is_bad: Callable[[float], bool] = lambda loss: False) -> StepResult:
        batch = Batch.from_numpy(data.training.batch(number, ranks.rank, ranks.world_size))
        parts = batch.split(data.plan.accumulation)
        return train_step(engine, parts, 1e-3, is_bad, False, recurrent_state, lambda name: nullcontext())

    def weights() -> dict[str, torch.Tensor]:
        return gather_weights(engine)

    good = [step(0), step(1)]
    before = weights()
    bad = {"by its loss": step(2, lambda loss: True)}
    for name, change in (("loss of one rank", lambda loss: loss * math.nan), ("gradient of one rank", Poison.apply)):
        hook = engine.module.register_forward_hook(spoilt(change if ranks.rank == 1 else torch.clone))
        bad[name] = step(2)
        hook.remove()
    after = weights()
    good.append(step(2))
    return {"good": good, "bad": bad, "before": before, "after": after, "end": weights()}


@pytest.fixture(scope="module")
def found(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("engine")
    return on_ranks(2, partial(on_rank, Run(folder, data)), folder)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: "-".join(map(str, CASES[index][:2])))
def test_a_bad_step_changes_nothing_on_any_rank(found: list[list[dict[str, Any]]], index: int) -> None:
    case, other = (ranks[index] for ranks in found)
    assert [repr(case[kind]) for kind in ("good", "bad")] == [repr(other[kind]) for kind in ("good", "bad")]
    for step in case["good"]:
        assert math.isfinite(step.loss)
        assert 0 < step.grad_norm < math.inf
        assert not (step.bad or step.skipped or step.stop)
    for step in case["bad"].values():
        assert step.bad and step.skipped
    assert math.isnan(case["bad"]["loss of one rank"].loss)
    assert math.isfinite(case["bad"]["gradient of one rank"].loss)
    assert case["bad"]["gradient of one rank"].grad_norm == math.inf
    for name, weight in case["before"].items():
        assert torch.equal(case["after"][name], weight), name
    assert any(not torch.equal(case["end"][name], weight) for name, weight in case["after"].items())
