"""Functions that run on several gloo processes at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.warm import processes
from tostlm.launch import RankInfo
from tostlm.launch.local import rank_env
from tostlm.train.engine import init_distributed


def on_ranks(world_size: int, function: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What `function(rank, world_size)` returns on each of `world_size` processes that have met."""
    folder.mkdir(exist_ok=True)
    ranks = [processes.Process(target=_run, args=(function, place, folder)) for place in rank_env(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not any(rank.exitcode for rank in ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(function: Callable[[int, int], Any], place: dict[str, str], folder: Path) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    rank, world_size = int(place["RANK"]), int(place["WORLD_SIZE"])
    init_distributed(RankInfo(rank, rank, world_size))
    torch.save(function(rank, world_size), folder / f"{rank}.pt")
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
