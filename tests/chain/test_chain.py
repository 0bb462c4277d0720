"""States one after the other are one operation, whose gradients run the same chain back."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tostlm.chain import chain, delta_chain, operator

KEPT = pytest.mark.parametrize("kept_rows", [1, 4], ids=["number", "rows"])
STEPS = pytest.mark.parametrize("N", [0, 3])
ORDERS = pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])


@KEPT
@STEPS
@ORDERS
def test_chain_equals_a_loop_with_gradients(kept_rows: int, N: int, back: bool) -> None:
    added, kept, first = draw((2, N, 3, 4, 2), (2, N, 3, kept_rows, 1), (2, 3, 4, 2))
    state, states = first, [first] * N
    for n in reversed(range(N)) if back else range(N):
        states[n] = state
        state = kept[:, n] * state + added[:, n]
    assert_same([*chain(added, kept, first, back)], [_stack(states, added), state])
    assert_differentiable(lambda *inputs: chain(*inputs, back), [added, kept, first])


@KEPT
@STEPS
@ORDERS
@pytest.mark.parametrize("with_added", [False, True])
def test_delta_chain_equals_a_loop_with_gradients(kept_rows: int, N: int, back: bool, with_added: bool) -> None:
    L = 3
    own, reads, ends, kept, added, first = draw(
        *((2, N, 3, *shape) for shape in ((L, 2), (L, 4), (4, L), (kept_rows, 1), (4, 2))), (2, 3, 4, 2)
    )
    state, states, written = first, [first] * N, [own[:, 0]] * N if N else []
    for n in reversed(range(N)) if back else range(N):
        states[n] = state
        written[n] = own[:, n] + reads[:, n] @ state
        state = kept[:, n] * state + ends[:, n] @ written[n] + (added[:, n] if with_added else 0.0)
    inputs = [own, reads, ends, kept, *([added] if with_added else []), first]

    def found(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = tensors[4] if with_added else None
        result: tuple[Tensor, ...] = delta_chain(*tensors[:4], given, tensors[-1], back)
        return result

    assert_same([*found(*inputs)], [_stack(written, own), _stack(states, added), state])
    assert_differentiable(found, inputs)


def test_they_are_sound_custom_ops() -> None:
    added, kept, first, own, reads, ends = draw(
        (2, 3, 1, 4, 2), (2, 3, 1, 1, 1), (2, 1, 4, 2), (2, 3, 1, 3, 2), (2, 3, 1, 3, 4), (2, 3, 1, 4, 3)
    )
    torch.library.opcheck(operator.chain, (added, kept, first))
    torch.library.opcheck(operator.delta_chain, (own, reads, ends, kept, added, first, True))
    torch.library.opcheck(operator.delta_chain, (own, reads, ends, kept, None, first))


def test_traced_their_length_does_not_count() -> None:
    """torch.compile took minutes for a context of a few thousand tokens when it saw every step."""

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        *rest, first = inputs
        u, _, last = delta_chain(*rest, None, first)
        return torch.autograd.grad(u.sum() + last.sum(), inputs)

    def calls(N: int) -> int:
        inputs = draw((2, N, 1, 3, 2), (2, N, 1, 3, 4), (2, N, 1, 4, 3), (2, N, 1, 1, 1), (2, 1, 4, 2))
        return len(make_fx(gradients)(*inputs).graph.nodes)

    assert calls(40) == calls(2)


def assert_same(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)


def assert_differentiable(function: Callable[..., object], inputs: Sequence[Tensor]) -> None:
    """To the second order: the gradients of a chain are a chain."""
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def _stack(steps: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(steps, 1) if steps else torch.empty_like(like)


@pytest.mark.parametrize("back", [False, True])
def test_an_exported_program_has_torchs_operators_alone(back: bool) -> None:
    class Chains(torch.nn.Module):
        def forward(self, x: Tensor, kept: Tensor, first: Tensor) -> tuple[Tensor, ...]:
            added = x @ x.mT
            return (*chain(added, kept, first, back), *delta_chain(x, x, x.mT, kept, added, first, back))

    generator = torch.Generator().manual_seed(0)
    x, first = (torch.randn(shape, generator=generator) for shape in ((2, 3, 1, 4, 4), (2, 1, 4, 4)))
    kept = torch.rand(2, 3, 1, 1, 1, generator=generator)
    program = torch.export.export(Chains(), (x, kept, first))
    assert {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"} == {"aten"}
    assert_same([*program.module()(x, kept, first)], [*Chains()(x, kept, first)])
