"""Functions that run on several gloo processes at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.warm import processes
from tostlm.launch import Ranks
from tostlm.launch.local import places
from tostlm.train.engine import join_ranks


def on_ranks(world: int, function: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What `function(rank, world)` returns on each of `world` processes that have met."""
    folder.mkdir(exist_ok=True)
    ranks = [processes.Process(target=_run, args=(function, place, folder)) for place in places(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not any(rank.exitcode for rank in ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(function: Callable[[int, int], Any], place: dict[str, str], folder: Path) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    rank, world = int(place["RANK"]), int(place["WORLD_SIZE"])
    join_ranks(Ranks(rank, rank, world))
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
