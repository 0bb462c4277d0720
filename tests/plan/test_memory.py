"""The memory of a plan is what processes take."""

from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.plan.peak import peak_bytes
from tests.processes import on_ranks
from tests.train.run_helpers import zero_options
from tostlm.config import RunConfig
from tostlm.plan import Memory, memory, total_parameters

LARGE = ["model.width=512", "model.depth=6", "model.heads=8", "model.vocab_size=8192", "model.layer_scale=null"]
LARGE += ["data.context_tokens=256", "train.batch_tokens=4096", "train.micro_batch_tokens=1024"]
BF16, AUTOCAST = ["deepspeed.bf16.enabled=true"], ["deepspeed.torch_autocast={enabled: true, dtype: bfloat16}"]
SLOW = pytest.mark.slow


def large(run: Run, stage: int, *overrides: str) -> RunConfig:
    return run.config(*zero_options(stage), *LARGE, *overrides)


@pytest.mark.parametrize(
    ("world_size", "stage", "overrides"),
    [
        pytest.param(1, 1, []),
        *(
            pytest.param(ranks, stage, [], marks=SLOW)
            for ranks in (1, 2, 4)
            for stage in range(4)
            if (ranks, stage) != (1, 1)
        ),
        *(pytest.param(2, stage, BF16, marks=SLOW) for stage in (1, 2, 3)),
        *(pytest.param(2, stage, AUTOCAST, marks=SLOW) for stage in (1, 3)),
        pytest.param(1, 1, ["model.layers=[{mixer: softmax}]"], marks=SLOW),
        pytest.param(1, 1, ["model.recipe=modern", "model.layers=[{mixer: tssa_delta}]"], marks=SLOW),
        pytest.param(1, 1, ["train.activation_checkpointing_every=1"], marks=SLOW),
        pytest.param(2, 1, ["train.ema_decay=0.99", "train.micro_batch_tokens=2048"], marks=SLOW),
    ],
)
def test_processes_take_the_memory_that_is_planned(
    run: Run, tmp_path: Path, world_size: int, stage: int, overrides: list[str]
) -> None:
    config, small = (large(run, stage, *overrides, *shape) for shape in ([], ["model.width=64", "model.depth=1"]))
    taken = max(on_ranks(world_size, partial(peak_bytes, config, small), tmp_path / "ranks"))
    assert memory(config, world_size, on_gpu=False).total == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "overrides", "bytes_per_parameter"),
    [
        (0, [], (4, 0, 8, 4)),
        (1, [], (4, 4 / 4, 8 / 4, 4)),
        (2, [], (4, 4 / 4, 8 / 4, 4 / 4)),
        (3, [], (4 / 4, 0, 8 / 4, 4 / 4)),
        (2, BF16, (2, 4 / 4, 8 / 4, 2 / 4)),
        (3, BF16, (2 / 4, 4 / 4, 8 / 4, 2 / 4)),
        (1, ["train.ema_decay=0.9"], (4, 4 / 4, 12 / 4, 4)),
    ],
)
def test_what_four_ranks_hold_of_each_parameter(
    run: Run, stage: int, overrides: list[str], bytes_per_parameter: tuple[float, ...]
) -> None:
    config = large(run, stage, *overrides, "train.batch_tokens=8192")  # in two passes
    found = memory(config, 4, on_gpu=False)
    P = total_parameters(config)
    parts = (found.weights, found.master, found.optimizer, found.gradients)
    assert [part / P for part in parts] == pytest.approx(bytes_per_parameter, rel=1e-6)


def test_gpus_hold_a_bucket_of_gradients_and_no_copies_in_the_update(run: Run) -> None:
    config = large(run, 1, "train.micro_batch_tokens=256")
    on_cpu, on_gpu = (memory(config, 1, on_gpu=gpu) for gpu in (False, True))
    assert on_gpu.buffers == 4 * 500_000_000 > on_cpu.buffers
    sized = large(run, 1, "train.micro_batch_tokens=256", "deepspeed.zero_optimization.reduce_bucket_size=1000000")
    assert memory(sized, 1, on_gpu=True).total < on_cpu.total


def test_offloading_takes_the_optimizer_off_the_gpu(run: Run) -> None:
    offload = ["deepspeed.zero_optimization.offload_optimizer.device=cpu"]
    found = memory(large(run, 3, *offload), 2, on_gpu=True)
    assert (found.master, found.optimizer, found.gradients) == (0, 0, 0)
    assert found.weights == 2 * total_parameters(large(run, 3))
    with_weights = large(run, 3, *offload, "deepspeed.zero_optimization.offload_param.device=cpu")
    assert memory(with_weights, 2, on_gpu=True).weights == 0


def test_recomputed_blocks_keep_their_output_alone(run: Run) -> None:
    every: dict[int, Memory] = {
        n: memory(large(run, 1, f"train.activation_checkpointing_every={n}"), 1, on_gpu=True) for n in (1, 2)
    }
    whole = memory(large(run, 1), 1, on_gpu=True)
    assert every[1].activations < every[2].activations < whole.activations
