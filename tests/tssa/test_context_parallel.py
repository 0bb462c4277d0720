"""whole == ranks: a sequence split over 1, 2 and 4 gloo processes, in values, end state and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import Sent, on_ranks
from tests.tssa.common import Inputs, draw
from tostlm.tssa import tssa
from tostlm.tssa.context_parallel import tssa_over_ranks

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


def on_rank(rank: int, world_size: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor], int]]:
    sent = Sent()
    results = []
    for case in CASES:
        inputs = draw(**{"T": 64, **case})
        T = inputs.w.shape[1]
        cuts = [
            0,
            *(T * (r + 1) // world_size - (5 * r if r + 1 < world_size else 0) for r in range(world_size)),
        ]  # uneven pieces
        piece = slice(cuts[rank], cuts[rank + 1])
        sent.bytes = 0
        y, after = tssa_over_ranks(
            inputs.w[:, piece],
            inputs.temp,
            None if inputs.bias is None else inputs.bias[..., piece, :],
            inputs.rho,
            None if inputs.reset is None else inputs.reset[:, piece],
            inputs.state,
        )
        forward_bytes = sent.bytes
        # The end state is on every rank; its share of the loss is counted once.
        weight = arriving(torch.empty(inputs.w.shape))[:, piece]
        loss = (y * weight).sum() + sum((x * arriving(x)).sum() for x in after) / world_size
        gradients = [g.contiguous() for g in torch.autograd.grad(loss, inputs.differentiable())]
        for gradient in gradients:
            dist.all_reduce(gradient)
        results.append(([y.detach(), *(x.detach() for x in after)], gradients, forward_bytes))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_equal_the_whole(world_size: int, tmp_path: Path) -> None:
    found = on_ranks(world_size, on_rank, tmp_path)
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
