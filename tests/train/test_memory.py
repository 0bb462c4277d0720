"""What a rank's memory holds of a model: at ZeRO stage 3 its share and a layer, from the start on."""

import ctypes
import resource
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.processes import on_ranks
from tests.train.engines import train_steps
from tests.train.run_helpers import zero_options
from tostlm.launch import RankInfo
from tostlm.model import count_parameters, largest_part_numel
from tostlm.train.batches import RecurrentState, open_data
from tostlm.train.engine import start_engine

pytestmark = pytest.mark.slow

SHAPE = ["model.width=512", "model.depth=16", "model.heads=8", "train.batch_tokens=128", "train.micro_batch_tokens=64"]
M_MMAP_THRESHOLD = -3


def memory(name: str) -> int:
    """A number of bytes in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def train(run: Run, overrides: list[str], rank: int, world_size: int, steps: int = 2) -> None:
    config, ranks = run.config(*overrides), RankInfo(rank, rank, world_size)
    data = open_data(config, world_size)
    engine = start_engine(config, data.plan, ranks)
    recurrent_state = RecurrentState(config, data.plan.accumulation, ranks)
    for _ in train_steps(config, data, engine, ranks, recurrent_state, 0, steps):
        pass
    engine.destroy()


def peak(run: Run, overrides: list[str], limit: int | None, rank: int, world_size: int) -> float | None:
    """The most bytes a parameter that training takes; None if it takes more than `limit`."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed leaves the process
    numel = count_parameters(run.config(*SHAPE).model)
    train(run, [*overrides, *SHAPE[3:]], rank, world_size)  # loads libraries
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + limit * numel,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory("VmRSS")
    try:
        train(run, [*overrides, *SHAPE], rank, world_size)
    except (MemoryError, RuntimeError) as error:
        assert limit is not None and ("memory" in str(error) or isinstance(error, MemoryError)), error
        return None
    return (memory("VmHWM") - before) / numel


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16"), (2, "autocast")])
def test_stage_3_takes_a_share_and_a_layer(run: Run, tmp_path: Path, world_size: int, precision: str) -> None:
    overrides = zero_options(3, str(precision == "bf16").lower())
    if precision == "autocast":
        overrides.append("deepspeed.torch_autocast={enabled: true, dtype: bfloat16}")
    config = run.config(*overrides, *SHAPE).model
    layer = 4 * largest_part_numel(config) / count_parameters(config)
    found = max(on_ranks(world_size, partial(peak, run, overrides, None), tmp_path / "ranks"))
    assert found <= 16 / world_size + layer + 3


def test_a_model_that_fits_no_rank_trains_on_two(run: Run, tmp_path: Path) -> None:
    """With 14 bytes a parameter: weights, gradients and moments alone take 16."""
    for stage, world_size, fits in ((3, 2, True), (3, 1, False), (0, 1, False)):
        folder = tmp_path / f"{stage} on {world_size}"
        for result in on_ranks(world_size, partial(peak, run, zero_options(stage), 14), folder):
            assert (result is not None) == fits, (stage, world_size, result)
