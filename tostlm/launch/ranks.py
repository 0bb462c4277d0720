"""Which process of a run this is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from tostlm.errors import UserError

FIRST_PORT, PORTS = 20000, 20000  # a Slurm job's rendezvous port: one of these, by its number


class Ranks(NamedTuple):
    """A process's place in its run."""

    rank: int
    local_rank: int  # on its node
    world: int


def ranks_from_environment(environment: Mapping[str, str]) -> Ranks | None:
    """The place that torchrun, `tostlm train --nproc` or a Slurm step gave this process; None outside of them."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, local, world = (environment.get(key, "0") for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank, local, world = (
            environment.get(key, "0") for key in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        )
    else:
        return None
    try:
        return Ranks(int(rank), int(local), int(world))
    except ValueError:
        raise UserError(f"rank {rank!r}, local rank {local!r} and world size {world!r} must be numbers") from None


def export_rendezvous(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell torch.distributed where the ranks meet, where the launcher has not."""
    environment.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.local_rank), WORLD_SIZE=str(ranks.world))
    if "MASTER_ADDR" not in environment and "SLURM_STEP_NODELIST" in environment:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
            check=True,
            capture_output=True,
            text=True,
        )
        environment["MASTER_ADDR"] = nodes.stdout.split()[0]
    if "MASTER_PORT" not in environment and "SLURM_JOB_ID" in environment:
        environment["MASTER_PORT"] = str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS)
