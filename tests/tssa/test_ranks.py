"""whole == ranks: a sequence split over 1, 2 and 4 gloo processes, in values, end state and every gradient."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.tssa.common import Inputs, draw
from tostlm.tssa import tssa
from tostlm.tssa.ranks import tssa_over_ranks

CASES: list[dict[str, Any]] = [
    {},
    {"bias": "shared", "options": ("rho",)},
    {"bias": "own", "options": ("rho", "reset", "state")},
    {"bias": "shared", "options": ("state",), "T": 101},
]


def arriving(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.arange(x.numel()).double()).view_as(x)


def whole(inputs: Inputs) -> list[torch.Tensor]:
    """y, the end state, and the gradients of sum(y g) + sum(end state g')."""
    y, after = tssa(*inputs)
    gradients = torch.autograd.grad([y, *after], inputs.differentiable(), [arriving(y), *map(arriving, after)])
    return [y, *after, *gradients]


def on_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    sent = 0
    all_gather = dist.all_gather

    def counted(parts: list[torch.Tensor], x: torch.Tensor, **options: Any) -> Any:
        nonlocal sent
        sent += x.nbytes
        return all_gather(parts, x, **options)

    dist.all_gather = counted
    results = []
    for case in CASES:
        inputs = draw(**{"T": 64, **case})
        T = inputs.w.shape[1]
        cuts = [0, *(T * (r + 1) // world - (5 * r if r + 1 < world else 0) for r in range(world))]  # uneven pieces
        piece = slice(cuts[rank], cuts[rank + 1])
        sent = 0
        y, after = tssa_over_ranks(
            inputs.w[:, piece],
            inputs.temp,
            None if inputs.bias is None else inputs.bias[..., piece, :],
            inputs.rho,
            None if inputs.reset is None else inputs.reset[:, piece],
            inputs.state,
        )
        # The end state is on every rank; its share of the loss is counted once.
        weight = arriving(torch.empty(inputs.w.shape))[:, piece]
        loss = (y * weight).sum() + sum((x * arriving(x)).sum() for x in after) / world
        gradients = [g.contiguous() for g in torch.autograd.grad(loss, inputs.differentiable())]
        for gradient in gradients:
            dist.all_reduce(gradient)
        results.append(([y.detach(), *(x.detach() for x in after)], gradients, sent))
    torch.save(results, Path(folder) / f"{rank}.pt")
    os._exit(0)  # torch's gloo threads now and then abort a process whose interpreter ends around them


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_equal_the_whole(world: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(on_rank, (world, port, str(tmp_path)), nprocs=world)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for index, case in enumerate(CASES):
        inputs = draw(**{"T": 64, **case})
        y, *rest = whole(inputs)
        states, expected_gradients = rest[:3], rest[3:]
        torch.testing.assert_close(torch.cat([ranks[index][0][0] for ranks in found], 1), y, rtol=1e-9, atol=1e-9)
        for ranks in found:
            outputs, gradients, sent = ranks[index]
            for a, b in zip(outputs[1:], states, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            for a, b in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
            B, _, C = inputs.w.shape
            H = inputs.temp.shape[0]
            assert sent == 8 * B * (C + H + C + 2 * H)  # two exchanges, whatever the number of tokens
