"""Functions that run on several gloo processes at once."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, function: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What `function(rank, world)` returns on each of `world` processes that have met."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, (function, world, port, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _run(rank: int, function: Callable[[int, int], Any], world: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(function(rank, world), folder / f"{rank}.pt")
    os._exit(0)  # torch's gloo threads now and then abort a process whose interpreter ends around them


class Sent:
    """Counts the bytes that this rank puts into collectives from its making on."""

    def __init__(self) -> None:
        self.bytes = 0
        for name, argument in (("all_gather", 1), ("all_reduce", 0), ("all_to_all_single", 1)):
            setattr(dist, name, self._counted(getattr(dist, name), argument))

    def _counted(self, collective: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.bytes += arguments[argument].nbytes
            return collective(*arguments, **options)

        return call
