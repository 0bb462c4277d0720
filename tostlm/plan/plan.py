"""A run as a whole: what it takes on so many nodes of some accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.accelerators import ACCELERATORS, Cluster
from tostlm.config import RunConfig, batch_plan, load_config, matmul_dtype, nearest
from tostlm.errors import UserError
from tostlm.model import training_flops_per_token
from tostlm.plan.communication import Traffic, traffic
from tostlm.plan.fit import USABLE, advice
from tostlm.plan.memory import Memory, kept_activations, memory
from tostlm.plan.sizes import checkpoint_bytes, total_parameters
from tostlm.plan.timing import Rates, StepTime, measured_rate, step_time


class Plan(NamedTuple):
    """What a run takes on `nodes` nodes."""

    nodes: int
    gpus: int  # or processes on CPUs, over all nodes
    device: str
    parameters: int
    flops_per_token: float  # of a pass forward and back
    accumulation: int  # passes of a rank in a step
    memory: Memory  # of a rank
    usable_bytes: int | None  # of its device; None where that is not known
    traffic: Traffic  # of a rank and step
    sent_bytes: float  # by a rank in a step
    step: StepTime
    tokens_per_second: float
    utilization: float  # of the device's peak, by the model's own operations
    days: float
    gpu_hours: float
    kilowatt_hours: float  # of the accelerators alone
    price: float | None
    checkpoint_bytes: int
    checkpoint_seconds: float
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits into the memory of its devices, as far as that is known."""
        return self.usable_bytes is None or self.memory.total <= self.usable_bytes


def plan_runs(
    config_file: Path,
    overrides: Sequence[str],
    nodes: Sequence[int],
    per_node: int,
    device: str,
    bench: Path | None = None,
    price: float | None = None,
    storage: float = 2e9,
) -> list[Plan]:
    """Return the plans of a run on each number of nodes.

    Args:
        config_file: a YAML file, or the name of a shipped config; with dotted `overrides`.
        per_node: GPUs of a node, or processes of one without.
        device: a name in `ACCELERATORS`.
        bench: a file of `tostlm bench train --out`, whose rate is used in place of the roofline.
        price: of an hour of one GPU.
        storage: bytes a second that checkpoints are written with.

    Raises:
        UserError: the config is wrong, there is no such device, the ranks do not divide the batch, or the file of the
            benchmark has no rate of this model.
    """
    if device not in ACCELERATORS:
        raise UserError(
            f"--device {device} is not known{nearest(device, ACCELERATORS)}; known are {', '.join(ACCELERATORS)}"
        )
    config = load_config(config_file, overrides)
    rate = None
    if bench is not None:
        rate = measured_rate(bench, (config_file.stem, config.run_dir.name), config.data.context_tokens)
    rates = Rates(tokens_per_second=rate, price=price, storage=storage)
    return [plan_run(config, each, per_node, device, rates) for each in nodes]


def plan_run(config: RunConfig, nodes: int, per_node: int, device_name: str, rates: Rates) -> Plan:
    """Return the plan of a run on `nodes` x `per_node` of a device; see `plan_runs`."""
    device = ACCELERATORS[device_name]
    cluster, on_gpu = Cluster(nodes, per_node, device), bool(device.chip)
    ranks, moved = cluster.ranks, traffic(config, cluster.ranks)
    step = step_time(config, moved, cluster, kept_activations(config, ranks), rates)
    tokens_per_second = config.train.batch_tokens / step.total
    flops = training_flops_per_token(config.model, config.data.context_tokens)
    hours = config.tokens / tokens_per_second / 3600
    saved = checkpoint_bytes(config)
    return Plan(
        nodes=nodes,
        gpus=ranks,
        device=device_name,
        parameters=total_parameters(config),
        flops_per_token=flops,
        accumulation=batch_plan(config, ranks).accumulation,
        memory=memory(config, ranks, on_gpu),
        usable_bytes=None if device.memory_bytes is None else int(USABLE * device.memory_bytes),
        traffic=moved,
        sent_bytes=moved.sent(ranks),
        step=step,
        tokens_per_second=tokens_per_second,
        utilization=flops * tokens_per_second / ranks / device.peak(matmul_dtype(config)),
        days=hours / 24,
        gpu_hours=hours * ranks,
        kilowatt_hours=hours * ranks * device.watts / 1000,
        price=None if rates.price is None else rates.price * hours * ranks,
        checkpoint_bytes=saved,
        checkpoint_seconds=saved / rates.storage,
        advice=() if device.memory_bytes is None else tuple(advice(config, ranks, device.memory_bytes, on_gpu)),
    )
