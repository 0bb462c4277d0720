"""whole == ranks: a sequence split over 1, 2 and 4 gloo processes, in values, end state and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.processes import Sent, on_ranks
from tests.tssa.common import Arguments, assert_same, draw
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


def with_losses_of_their_own(rank: int, world_size: int) -> list[torch.Tensor]:
    """Rank 0's loss is of its tokens, rank 1's of the energy in the end alone."""
    inputs = draw(T=64, bias="shared", options=("rho", "state"))
    own = slice(32 * rank, 32 * rank + 32)
    assert inputs.bias is not None
    y, after = tssa(
        inputs.w[:, own], inputs.temp, inputs.bias[own], inputs.rho, None, inputs.state, group=dist.group.WORLD
    )
    loss = after.energy.square().sum() if rank else y.square().sum()
    gradients = [g.contiguous() for g in torch.autograd.grad(loss, inputs.differentiable())]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return gradients


def test_each_rank_may_have_another_loss(tmp_path: Path) -> None:
    inputs = draw(T=64, bias="shared", options=("rho", "state"))
    y, after = tssa(*inputs)
    loss = y[:, :32].square().sum() + after.energy.square().sum()
    expected = torch.autograd.grad(loss, inputs.differentiable())
    for found in on_ranks(2, with_losses_of_their_own, tmp_path):
        assert_same(found, list(expected))


def few_tokens(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    """The tokens lie on one of the ranks alone; the other has none."""
    found = []
    for options in (("state",), ("rho", "state")):
        for holder in (0, 1):
            inputs = draw(T=40, options=options)
            own = slice(0, 40 if rank == holder else 0)
            y, after = tssa(inputs.w[:, own], inputs.temp, None, inputs.rho, None, inputs.state, group=dist.group.WORLD)
            loss = y.square().sum() + sum((x * output_grad(x)).sum() for x in after) / 2
            gradients = [g.contiguous() for g in torch.autograd.grad(loss, inputs.differentiable())]
            for gradient in gradients:
                dist.all_reduce(gradient)
            found.append([*(x.detach() for x in after), *gradients])
    return found


def test_a_rank_may_have_no_tokens(tmp_path: Path) -> None:
    expected = []
    for options in (("state",), ("rho", "state")):
        inputs = draw(T=40, options=options)
        y, after = tssa(*inputs)
        loss = y.square().sum() + sum((x * output_grad(x)).sum() for x in after)
        expected += [[*after, *torch.autograd.grad(loss, inputs.differentiable())]] * 2
    for rank in on_ranks(2, few_tokens, tmp_path):
        for a, b in zip(rank, expected, strict=True):
            assert_same(a, b, 1e-8)


def alone(rank: int, world_size: int) -> list[Any]:
    """On a group of one rank: no sequences, the bytes kept of the energy, and second derivatives."""
    group = dist.group.WORLD
    y, after = tssa(torch.zeros(0, 9, 8), torch.ones(2), None, torch.ones(2), group=group)
    found: list[Any] = [(tuple(y.shape), *(tuple(x.shape) for x in after)), []]
    w = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, after = tssa(w, torch.ones(2), group=group)
    found.append([x.untyped_storage().nbytes() - x.nbytes for x in after])
    for result in (y.square(), y, *after):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(result.sum(), w, create_graph=True)
        found[1].append(True)
    return found


def test_edges_on_one_rank(tmp_path: Path) -> None:
    (found,) = on_ranks(1, alone, tmp_path)
    assert found == [((0, 9, 8), (0, 8), (0, 2), (0, 8)), [True] * 5, [0, 0, 0]]


def outside(rank: int, world_size: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(ValueError, match="rank 1 is not in the group") as error:
        tssa(torch.zeros(1, 4, 8), torch.ones(2), group=group)
    return str(error.value)


def test_a_rank_outside_the_group_is_an_error(tmp_path: Path) -> None:
    assert "whose ranks share the sequence" in on_ranks(2, outside, tmp_path)[1]
