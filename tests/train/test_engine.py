"""A step is made on every rank or on none: what a bad one leaves behind under every ZeRO stage."""

import math
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.conftest import Run
from tests.train.test_training import options
from tostlm.launch import Ranks, export_rendezvous
from tostlm.model import create_lm
from tostlm.train.carry import Carry
from tostlm.train.engine import Step, join_ranks, start_engine, train_step
from tostlm.train.engine_state import whole_weights
from tostlm.train.feed import Rows, training_loader

ACCUMULATE = "data_types.grad_accum_dtype=fp32"
CASES = [(stage, bf16, ()) for stage in (0, 1, 2, 3) for bf16 in ("false", "true")]
CASES += [(stage, "true", (f"deepspeed.{ACCUMULATE}",)) for stage in (1, 2, 3)]


class Poison(torch.autograd.Function):
    """The loss as it is, with a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan


def spoilt(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda module, arguments, output: (change(output[0]), output[1])


def on_rank(rank: int, world: int, port: int, run: Run, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = Ranks(rank, rank, world)
    export_rendezvous(ranks)
    join_ranks(ranks)
    found = [bad_among_good(run, ranks, *case) for case in CASES]
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # torch's gloo threads now and then abort a process whose interpreter ends around them


def bad_among_good(run: Run, ranks: Ranks, stage: int, bf16: str, more: tuple[str, ...]) -> dict[str, Any]:
    config = run.config(*options(stage, bf16), *more)
    loader = training_loader(config)
    engine = start_engine(config, create_lm(config.model, config.seed), ranks)

    carry = Carry(config, engine.gradient_accumulation_steps(), ranks)

    def step(number: int, is_bad: Callable[[float], bool] = lambda loss: False) -> Step:
        rows = Rows.of(loader.batch(number, ranks.rank, ranks.world))
        return train_step(engine, rows, 1e-3, is_bad, False, carry, lambda name: nullcontext())

    def weights() -> dict[str, torch.Tensor]:
        return whole_weights(engine)

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(on_rank, (2, port, Run(folder, data), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


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
