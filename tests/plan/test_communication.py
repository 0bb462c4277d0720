"""The traffic of a plan is what DeepSpeed puts into collectives."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import Run
from tests.plan.peak import steps
from tests.processes import on_ranks
from tests.train.run_helpers import zero_options
from tostlm.accelerators import ACCELERATORS, Cluster
from tostlm.plan.communication import Traffic, seconds, traffic
from tostlm.plan.sizes import total_parameters

COUNTED = {  # of collectives: what the plan calls them, and which argument is whole
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}


class Collectives(TorchDispatchMode):
    """Counts the bytes of collectives, by their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            kind, place = COUNTED.get(name, (name, 0))
            whole = args[place]
            self.bytes[kind] += sum(x.nbytes for x in whole) if isinstance(whole, list) else whole.nbytes
        return func(*args, **(kwargs or {}))


def sent(run: Run, stages: Sequence[int], batch: int, rank: int, world_size: int) -> dict[int, Counter[str]]:
    found = {}
    for stage in stages:
        config = run.config(*zero_options(stage), f"train.batch_tokens={batch}", "model.depth=4")
        take = steps(config, rank, world_size)
        take()  # the first gathers more at stage 3, before DeepSpeed knows the order of the weights
        with Collectives() as collectives:
            take()
        found[stage] = collectives.bytes
    return found


@pytest.mark.parametrize("passes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_traffic_of_a_step_at_every_stage(run: Run, tmp_path: Path, passes: int) -> None:
    batch = 2 * 128 * passes
    found = on_ranks(2, partial(sent, run, range(4), batch), tmp_path)[0]
    for stage, counted in found.items():
        config = run.config(*zero_options(stage), f"train.batch_tokens={batch}", "model.depth=4")
        expected = traffic(config, 2)
        for kind in ("all_reduce", "reduce_scatter", "all_gather"):
            # Parameters are padded, norms and flags are summed too, and weights that are still there are whole layers.
            slack = 0.04 * 4 * total_parameters(config) * passes
            assert counted[kind] == pytest.approx(getattr(expected, kind), abs=slack), (stage, kind, counted)
        others = set(counted) - {"all_reduce", "reduce_scatter", "all_gather"}
        assert sum(counted[kind] for kind in others) < slack, counted


def test_one_rank_sends_nothing(run: Run) -> None:
    assert traffic(run.config(), 1) == Traffic(0, 0, 0, 0)
    assert seconds(traffic(run.config(), 1), Cluster(1, 1, ACCELERATORS["h100-80gb"])) == 0


def test_a_ring_goes_at_the_pace_of_its_slowest_link() -> None:
    device, moved = ACCELERATORS["h100-80gb"], Traffic(10**9, 0, 0, 1)
    inside, across = (seconds(moved, Cluster(nodes, 16 // nodes, device)) for nodes in (1, 2))
    assert moved.sent(16) == 2 * 15 / 16 * 10**9
    assert across / inside == pytest.approx(device.link / device.network, rel=0.05)
