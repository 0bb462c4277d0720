"""Random inputs of the operator, and all that comes out of it, for the tests of this folder."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tostlm.tssa import Inputs, State, tssa, tssa_reference

Operator = Callable[..., tuple[Tensor, State]]


class Arguments(NamedTuple):
    w: Tensor
    temp: Tensor
    bias: Tensor | None
    rho: Tensor | None
    document_start_mask: Tensor | None
    state: State | None

    def differentiable(self) -> list[Tensor]:
        return [x for x in (self.w, self.temp, self.bias, self.rho, *(self.state or ())) if x is not None]


def draw(
    B: int = 2, T: int = 33, H: int = 3, D: int = 4, bias: str = "none", options: Sequence[str] = (), seed: int = 0
) -> Arguments:
    """Random inputs in float64, every floating one asking for its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def positive(*shape: int) -> Tensor:
        return (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    return Arguments(
        w=normal(B, T, H * D),
        temp=positive(H),
        bias={"none": lambda: None, "shared": lambda: normal(T, H), "own": lambda: normal(B, T, H)}[bias](),
        rho=torch.linspace(1, 0.5, H, dtype=torch.float64).requires_grad_() if "rho" in options else None,
        document_start_mask=torch.rand(B, T, generator=generator) < 0.1 if "documents" in options else None,
        state=State(positive(B, H * D), positive(B, H), positive(B, H * D)) if "state" in options else None,
    )


def reference(
    w: Tensor, temp: Tensor, bias: Tensor | None = None, rho: Tensor | None = None, *mask_and_state: Any
) -> tuple[Tensor, State]:
    """The reference, called as `tssa` is."""
    mask, state = (*mask_and_state, None, None)[:2]
    return tssa_reference(Inputs(w, temp, bias, rho, mask), state)


def outcome(operator: Operator, inputs: Arguments) -> list[Tensor]:
    """y, the end state and every gradient, from gradients that arrive at y and at the end state.

    What arrives are numbers that bf16 holds, the same in every dtype.
    """
    y, state = operator(*inputs)
    outputs = [y, *state]
    output_grads = [torch.sin(torch.arange(x.numel()).double()).bfloat16().to(x.dtype).view_as(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs.differentiable(), output_grads, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in inputs.differentiable()]
    return [*outputs, *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


def in_pieces(cuts: Sequence[int]) -> Operator:
    """The operator called piece by piece, each with the state of the one before."""

    def operator(
        w: Tensor, temp: Tensor, bias: Tensor | None, rho: Tensor | None, mask: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        ys = []
        edges = [0, *cuts, w.shape[1]]
        for start, stop in itertools.pairwise(edges):
            b = None if bias is None else bias[..., start:stop, :]
            piece_mask = None if mask is None else mask[:, start:stop]
            y, state = tssa(w[:, start:stop], temp, b, rho, piece_mask, state)
            ys.append(y)
        assert state is not None
        return torch.cat(ys, 1), state

    return operator


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=index: f"output {i}: {m}")
