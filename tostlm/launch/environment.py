"""Which process of a run this is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from tostlm.errors import UserError
from tostlm.launch.exit_report import EXIT_REPORT

FIRST_PORT, PORTS = 20000, 12000  # a Slurm job's rendezvous port: one of these, below those that Linux gives away


class RankInfo(NamedTuple):
    """A process's place in its run."""

    rank: int
    local_rank: int  # on its node
    world_size: int


def rank_from_environment(environment: Mapping[str, str]) -> RankInfo | None:
    """The place that torchrun, `tostlm train --nproc` or a Slurm step gave this process; None outside of them.

    Raises:
        UserError: it is no number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, local, world_size = (environment.get(key, "0") for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "0")) > (0 if EXIT_REPORT in environment else 1):
        # One task may be a shell (srun --pty bash), but for those of a job of ours.
        rank, local, world_size = (
            environment.get(key, "0") for key in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        )
    else:
        return None
    try:
        ranks = RankInfo(int(rank), int(local), int(world_size))
    except ValueError:
        raise UserError(f"rank {rank!r}, local rank {local!r} and world size {world_size!r} must be numbers") from None
    if not 0 <= ranks.rank < ranks.world_size:
        raise UserError(f"rank {rank} is not below the world size {world_size}; check RANK and WORLD_SIZE")
    return ranks


def export_rendezvous(ranks: RankInfo, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell torch.distributed where the ranks meet, where the launcher has not.

    Raises:
        UserError: nobody says where.
    """
    environment.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.local_rank), WORLD_SIZE=str(ranks.world_size))
    if "MASTER_ADDR" not in environment and "SLURM_STEP_NODELIST" in environment:
        environment["MASTER_ADDR"] = first_node(environment["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" not in environment and "SLURM_JOB_ID" in environment:
        environment["MASTER_PORT"] = str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS)
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in environment:
            raise UserError(f"RANK is set and {key} is not; export the address and a free port of rank 0's node")


def first_node(node_list: str) -> str:
    """The first of Slurm's list, as a07 is of a[07-09,12],b3; containers may lack scontrol, which would say."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]  # at commas outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
