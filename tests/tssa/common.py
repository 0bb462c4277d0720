"""Random inputs of the operator, and all that comes out of it, for the tests of this folder."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tostlm.tssa import State, tssa

Operator = Callable[..., tuple[Tensor, State]]


class Inputs(NamedTuple):
    w: Tensor
    temp: Tensor
    bias: Tensor | None
    rho: Tensor | None
    reset: Tensor | None
    state: State | None

    def differentiable(self) -> list[Tensor]:
        return [x for x in (self.w, self.temp, self.bias, self.rho, *(self.state or ())) if x is not None]


def draw(
    B: int = 2, T: int = 33, H: int = 3, D: int = 4, bias: str = "none", options: Sequence[str] = (), seed: int = 0
) -> Inputs:
    """Random inputs in float64, every floating one asking for its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    return Inputs(
        w=normal(B, T, H * D),
        temp=positive(H),
        bias={"none": lambda: None, "shared": lambda: normal(T, H), "own": lambda: normal(B, T, H)}[bias](),
        rho=torch.linspace(1, 0.5, H, dtype=torch.float64).requires_grad_() if "rho" in options else None,
        reset=torch.rand(B, T, generator=generator) < 0.1 if "reset" in options else None,
        state=State(positive(B, H * D), positive(B, H), positive(B, H * D)) if "state" in options else None,
    )


def outcome(operator: Operator, inputs: Inputs) -> list[Tensor]:
    """y, the end state and every gradient, from gradients that arrive at y and at the end state.

    What arrives are numbers that bf16 holds, the same in every dtype.
    """
    y, state = operator(*inputs)
    outputs = [y, *state]
    arriving = [torch.sin(torch.arange(x.numel()).double()).bfloat16().to(x.dtype).view_as(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs.differentiable(), arriving, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in inputs.differentiable()]
    return [*outputs, *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


def in_pieces(cuts: Sequence[int]) -> Operator:
    """The operator called piece by piece, each with the state of the one before."""

    def operator(
        w: Tensor, temp: Tensor, bias: Tensor | None, rho: Tensor | None, reset: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        ys = []
        edges = [0, *cuts, w.shape[1]]
        for start, stop in itertools.pairwise(edges):
            b = None if bias is None else bias[..., start:stop, :]
            y, state = tssa(w[:, start:stop], temp, b, rho, None if reset is None else reset[:, start:stop], state)
            ys.append(y)
        assert state is not None
        return torch.cat(ys, 1), state

    return operator


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=index: f"output {i}: {m}")
