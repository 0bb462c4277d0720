"""What a rank learns from its launcher, and what it reports back when it ends."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from tostlm.errors import UserError
from tostlm.files import write_atomically

FIRST_PORT, PORTS = 20000, 12000  # rendezvous ports of Slurm jobs, below the range that Linux assigns by itself
EXIT_REPORT = "TOSTLM_EXIT_REPORT"  # environment variable: the file in which the first failing rank reports its code
REPORT_SECONDS = 5.0  # how long a silent rank waits for the rank that reports the error


class RankInfo(NamedTuple):
    """A process's rank in its run, its rank on its node, and the number of all ranks."""

    rank: int
    local_rank: int
    world_size: int


def rank_from_environment(environment: Mapping[str, str]) -> RankInfo | None:
    """Return the rank that torchrun, `tostlm train --nproc` or a Slurm step gave this process; None outside of them.

    Raises:
        UserError: the environment's values are no valid rank.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    # A step of one task may be a shell (srun --pty bash), unless it belongs to one of our jobs.
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "0")) > (0 if EXIT_REPORT in environment else 1):
        keys = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return None
    rank, local, world_size = (environment.get(key, "0") for key in keys)
    try:
        info = RankInfo(int(rank), int(local), int(world_size))
    except ValueError:
        raise UserError(f"rank {rank!r}, local rank {local!r} and world size {world_size!r} must be numbers") from None
    if not 0 <= info.rank < info.world_size:
        raise UserError(f"rank {rank} is not below the world size {world_size}; check RANK and WORLD_SIZE")
    return info


def export_rendezvous(rank: RankInfo, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables from which torch.distributed learns rank and rendezvous; keep what the launcher has set.

    Raises:
        UserError: the rendezvous address or port is unknown.
    """
    environment.update(RANK=str(rank.rank), LOCAL_RANK=str(rank.local_rank), WORLD_SIZE=str(rank.world_size))
    if nodes := environment.get("SLURM_STEP_NODELIST"):
        environment.setdefault("MASTER_ADDR", first_node(nodes))
    if job := environment.get("SLURM_JOB_ID"):
        environment.setdefault("MASTER_PORT", str(FIRST_PORT + int(job) % PORTS))
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in environment:
            raise UserError(f"RANK is set and {key} is not; export the address and a free port of rank 0's node")


def first_node(node_list: str) -> str:
    """Return the first host of a Slurm node list: a07 for a[07-09,12],b3. Containers may lack scontrol to ask."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]  # at commas outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def exit_rank(code: int, silent: bool = False) -> NoReturn:
    """End this rank at once, and report a failure in the file that `EXIT_REPORT` names.

    Only the first rank's report counts: later ones usually only fail because they lost that rank. A `silent` rank gives
    the one that reports the error time to be first. The interpreter's own shutdown is skipped, as torch's gloo threads
    sometimes abort the process during it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a log on a full disk
            stream.flush()
    if code and EXIT_REPORT in os.environ:
        report, deadline = Path(os.environ[EXIT_REPORT]), time.monotonic() + REPORT_SECONDS
        while silent and not report.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        with suppress(OSError):  # a full disk
            write_atomically(report, f"{rank} {code}\n", durable=False, overwrite=False)
    os._exit(code)
