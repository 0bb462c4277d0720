"""What the ranks of a run send each other in a step, as DeepSpeed does it, and how long a network takes for it."""

from __future__ import annotations

import math
from typing import NamedTuple

from tostlm.accelerators import Cluster
from tostlm.checkpoint.layout import weights_dtype
from tostlm.config import RunConfig, batch_plan, zero_block
from tostlm.plan.sizes import gradient_dtype, total_parameters

LATENCY = 20e-6  # seconds that a collective takes beside its bytes, for each doubling of the ranks
LARGEST_MESSAGE = 500_000_000  # numbers that DeepSpeed puts into one collective, at stages 0 to 2


class Traffic(NamedTuple):
    """Bytes that a rank puts into the collectives of a step, or gets whole from them, and how many they are."""

    all_reduce: int  # gradients, at stages 0 to 2
    reduce_scatter: int  # gradients, at stage 3
    all_gather: int  # weights
    collectives: int

    def sent(self, ranks: int) -> float:
        """Return the bytes that each of so many ranks sends, along a ring."""
        share = (ranks - 1) / ranks
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


def traffic(config: RunConfig, world_size: int) -> Traffic:
    """Return the traffic of a step.

    Stages 0 and 1 sum gradients once a step and stage 2 after every micro-batch; at stage 1 and 2 the ranks gather
    updated weights once. Stage 3 gathers weights for every pass forward and back, but for those that are still there,
    and gives every rank its part of the gradients.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    if world_size == 1:
        return Traffic(0, 0, 0, 0)
    stage, P, passes = config.zero_stage, total_parameters(config), batch_plan(config, world_size).accumulation
    weights, gradients = P * weights_dtype(config).itemsize, P * gradient_dtype(config).itemsize
    if stage < 3:
        sums = passes if stage == 2 else 1
        messages = math.ceil(P / LARGEST_MESSAGE)
        return Traffic(gradients * sums, 0, weights if stage else 0, messages * (sums + (stage > 0)))
    zero = zero_block(config.deepspeed, config.model)
    live = min(P, int(zero["stage3_max_live_parameters"])) * weights_dtype(config).itemsize
    parts = config.model.depth + 2
    return Traffic(0, passes * gradients, passes * (2 * weights - live), passes * 3 * parts)


def seconds(traffic: Traffic, cluster: Cluster) -> float:
    """Return how long the traffic of a step takes where nothing else is done: a ring at the slowest of its links."""
    if cluster.ranks == 1:
        return 0.0
    device = cluster.device
    slowest = device.link if cluster.nodes == 1 else min(device.link, device.network)
    return traffic.sent(cluster.ranks) / slowest + traffic.collectives * LATENCY * math.log2(cluster.ranks)
