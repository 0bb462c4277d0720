"""whole == ranks: a sequence split over 1, 2 and 4 gloo processes, in values, end state and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.processes import Sent, on_ranks
from tests.tssa.common import Arguments, draw
from tostlm.tssa import State, tssa

CASES: list[dict[str, Any]] = [
    {},
    {"bias": "shared", "options": ("rho",)},
    {"bias": "own", "options": ("rho", "documents", "state")},
    {"bias": "shared", "options": ("state",), "T": 101},
]


def output_grad(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.arange(x.numel()).double()).view_as(x)


def whole(inputs: Arguments) -> list[torch.Tensor]:
    """y, the end state, and the gradients of sum(y g) + sum(end state g')."""
    y, after = tssa(*inputs)
    gradients = torch.autograd.grad([y, *after], inputs.differentiable(), [output_grad(y), *map(output_grad, after)])
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
        y, after = tssa(
            inputs.w[:, piece],
            inputs.temp,
            None if inputs.bias is None else inputs.bias[..., piece, :],
            inputs.rho,
            None if inputs.document_start_mask is None else inputs.document_start_mask[:, piece],
            inputs.state,
            group=dist.group.WORLD,
        )
        forward_bytes = sent.bytes
        # The end state is on every rank; its share of the loss is counted once.
        weight = output_grad(torch.empty(inputs.w.shape))[:, piece]
        loss = (y * weight).sum() + sum((x * output_grad(x)).sum() for x in after) / world_size
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


def in_narrow_dtypes(rank: int, world_size: int) -> list[float]:
    """The largest relative difference to one rank, of y and of the gradient of w, for each dtype."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        drawn = draw(T=128, D=16, bias="shared", options=("rho", "documents", "state"))
        w, temp = drawn.w.detach().to(dtype).requires_grad_(), drawn.temp.detach().float()
        rho, mask, state = drawn.rho, drawn.document_start_mask, drawn.state
        assert rho is not None and mask is not None and state is not None and drawn.bias is not None
        bias, before = drawn.bias.detach().float(), State(*(x.detach() for x in state))
        y, _ = tssa(w, temp, bias, rho.detach().float(), mask, before)
        tokens = slice(64 * rank, 64 * (rank + 1))
        piece = w.detach()[:, tokens].clone().requires_grad_()
        own, _ = tssa(piece, temp, bias[tokens], rho.detach().float(), mask[:, tokens], before, group=dist.group.WORLD)
        weight = output_grad(y).to(dtype)
        (grad,) = torch.autograd.grad(y, w, weight)
        (own_grad,) = torch.autograd.grad(own, piece, weight[:, tokens])
        for a, b in ((own, y[:, tokens]), (own_grad, grad[:, tokens])):
            results.append(float((a.double() - b.double()).norm() / b.double().norm()))
    return results


def test_ranks_equal_the_whole_in_narrow_dtypes(tmp_path: Path) -> None:
    """In fp32 and bf16 the C++ backend serves, where there is a compiler."""
    for errors in on_ranks(2, in_narrow_dtypes, tmp_path):
        assert max(errors[:2]) < 1e-5
        assert max(errors[2:]) < 5e-3


def allocated_bytes_per_token(rank: int, world_size: int) -> list[float]:
    found = []
    for T in (1024, 8192):
        w = torch.randn(1, T, 64).requires_grad_()
        rho = torch.full((2,), 0.99)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tssa(w, torch.ones(2), None, rho, group=dist.group.WORLD)[0].sum().backward()
        found.append(sum(max(0, event.self_cpu_memory_usage) for event in profiler.events()) / T)
    return found


def test_the_work_of_both_passes_is_linear_in_the_tokens(tmp_path: Path) -> None:
    ((short, long),) = on_ranks(1, allocated_bytes_per_token, tmp_path)
    assert long < 1.2 * short
