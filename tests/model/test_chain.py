"""States one after the other are one operation, whose gradients run the same chain back."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tostlm.model.parts.chain import chain

SHAPES = pytest.mark.parametrize("kept_shape", [(1, 1), (4, 1), (4, 4)], ids=["number", "rows", "matrix"])


@SHAPES
@pytest.mark.parametrize("N", [0, 1, 5])
def test_equals_a_loop_with_gradients(kept_shape: tuple[int, int], N: int) -> None:
    inputs = draw(N, kept_shape)
    states, last = chain(*inputs)
    added, kept, state = inputs
    for n in range(N):
        torch.testing.assert_close(states[:, n], state)
        state = (kept[:, n] @ state if kept_shape == (4, 4) else kept[:, n] * state) + added[:, n]
    torch.testing.assert_close(last, state)
    assert torch.autograd.gradcheck(chain, inputs)
    assert torch.autograd.gradgradcheck(chain, inputs)


@SHAPES
def test_is_a_sound_custom_op(kept_shape: tuple[int, int]) -> None:
    torch.library.opcheck(chain, draw(3, kept_shape))


def test_traced_its_length_does_not_count() -> None:
    """torch.compile took minutes for a context of a few thousand tokens when it saw every step."""

    def calls(N: int) -> int:
        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(chain(*inputs)[1].sum(), inputs)

        return len(make_fx(gradients)(*draw(N, (4, 4))).graph.nodes)

    assert calls(40) == calls(2)


def draw(N: int, kept_shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`added`, `kept` and `first` of two sequences and three heads, states of 4 x 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    return normal(2, N, 3, 4, 2), normal(2, N, 3, *kept_shape), normal(2, 3, 4, 2)
