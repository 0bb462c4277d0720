"""Every boolean option of DeepSpeed's ZeRO block: refused, or without effect on the losses and on what is saved."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.conftest import Run
from tests.processes import on_ranks
from tests.train.engines import state_facts, train_steps
from tostlm.config import RunConfig, deepspeed_block, load_config
from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.launch import RankInfo
from tostlm.train.batches import RecurrentState, open_data
from tostlm.train.engine import start_engine

STEPS = 2
OPTIONS: dict[str, Any] = {  # each boolean of the block, by its name in a config, and the value that is not the default
    field.alias or name: not field.default
    for name, field in DeepSpeedZeroConfig.model_fields.items()
    if bool in (field.annotation, *getattr(field.annotation, "__args__", ()))
}
OPTIONS |= {  # and sizes that move state or messages
    "sub_group_size": 1000,
    "reduce_bucket_size": 500,
    "allgather_bucket_size": 500,
    "stage3_prefetch_bucket_size": 10,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_module_granularity_threshold": 1000,
    "zero_hpz_partition_size": 2,
}


def train(config: RunConfig, ranks: RankInfo) -> tuple[list[float], list[str]]:
    """Train some steps; return the losses, and the parameters whose masters are not where they should be."""
    data = open_data(config, ranks.world_size)
    engine = start_engine(config, data.plan, ranks)
    none = RecurrentState(config, data.plan.accumulation, ranks)
    losses = [result.loss for result in train_steps(config, data, engine, ranks, none, 0, STEPS)]
    misplaced = state_facts(engine)["weights_unlike_masters"]
    engine.destroy()
    return losses, misplaced


def sweep(file: str, stage: int, rank: int, world_size: int) -> dict[str, Any]:
    """What training with each option gives at a stage, and under "nothing" without ZeRO's options, at stage 1."""
    found: dict[str, Any] = {}
    for name, value in {"nothing": None, **OPTIONS}.items():
        zero = {"stage": 1} if name == "nothing" else {"stage": stage, "param_persistence_threshold": 100, name: value}
        try:
            found[name] = train(
                load_config(Path(file), [f"deepspeed.zero_optimization={zero}"]), RankInfo(rank, rank, world_size)
            )
        except (UserError, SystemExit) as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_options_are_refused_or_harmless(run: Run, tmp_path: Path, stage: int) -> None:
    """Stages 1 and 2 are one class in DeepSpeed."""
    found = on_ranks(2, partial(sweep, str(run.file), stage), tmp_path / "ranks")[0]
    expected = found.pop("nothing")
    assert isinstance(expected, tuple)
    for name, result in found.items():
        if f"zero_optimization.{name}" in deepspeed_block.REFUSED:
            assert f"zero_optimization.{name}=" in result, name
        else:
            assert result == expected, name


def save_round_robin(file: str, rank: int, world_size: int) -> str:
    """What is said at the first save under an option that moves the masters, were it let through."""
    option = "deepspeed.zero_optimization.round_robin_gradients"
    deepspeed_block.REFUSED.clear()
    try:
        train(load_config(Path(file), [f"{option}=true"]), RankInfo(rank, rank, world_size))
    except UserError as error:
        return str(error)
    except SystemExit as end:
        return str(end.code)
    return "saved"


def test_masters_that_are_elsewhere_are_not_saved(run: Run, tmp_path: Path) -> None:
    first, second = on_ranks(2, partial(save_round_robin, str(run.file)), tmp_path / "ranks")
    assert "are not where tostlm reads them" in first
    assert second == str(EXIT_USER_ERROR)
