"""The kernels of a chain == its loop, in what it returns and every gradient.

`test_triton.py` runs this file twice: in Triton's interpreter, which needs no GPU, and on a GPU where there is one.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tostlm.chain import chain, delta_chain, operator
from tostlm.chain.triton import serves
from tostlm.model.parts.matrix_state import ChunkDecays, delta_rule
from tostlm.model.positions import SequencePositions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
only_gpu = pytest.mark.skipif(not GPU, reason="too large for the interpreter")
B, N, H = 2, 3, 2
Function = Callable[..., tuple[Tensor, ...]]
# L, D, V: sizes that fill tiles and ones that do not, up to the largest D
SHAPES = [(16, 32, 16), (5, 20, 17), (33, 100, 16), (1, 400, 9), pytest.param(64, 512, 768, marks=only_gpu)]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("D", "V", "rows"), [(16, 64, False), (20, 61, True)])
def test_chain(D: int, V: int, rows: bool, dtype: torch.dtype, back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw([(B, N, H, D, V), (B, N, H, D if rows else 1, 1), (B, H, D, V)], dtype)
    found = outcome(chain, inputs, back)
    monkeypatch.setattr(operator, "_triton", lambda: None)
    assert_close(found, outcome(chain, exact(inputs), back), 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize(("L", "D", "V"), SHAPES)
def test_delta_chain(L: int, D: int, V: int, with_added: bool, back: bool) -> None:
    tail = [(D, V)] if with_added else []
    rows = D if with_added else 1
    shapes = [*((B, N, H, *shape) for shape in [(L, V), (L, D), (D, L), (rows, 1), *tail]), (B, H, D, V)]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = delta_chain(*tensors[:4], tensors[4] if with_added else None, *tensors[-2:])
        return result

    assert_equals_the_loop(function, shapes, back)


def test_the_delta_rule_through_the_kernels() -> None:
    """What models make of it: tensors that are parts and transposes of others, and documents that start."""
    T, D, V = 70, 20, 24
    tokens = torch.zeros(B, T, dtype=torch.long, device=DEVICE)
    mask = tokens.bool()
    mask[0, 40] = True
    positions = SequencePositions.build(tokens, 0, None, mask, False)

    def function(q: Tensor, k: Tensor, v: Tensor, strengths: Tensor, logs: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        decays = ChunkDecays.build(-logs.square(), positions, B, T)
        k = torch.nn.functional.normalize(k, dim=-1)
        return delta_rule(q, k, k, v, strengths.sigmoid(), decays, positions, state)

    assert_equals_the_loop(function, [(B, T, H, D)] * 2 + [(B, T, H, V)] + [(B, T, H)] * 2 + [(B, H, D, V)])


def test_no_steps_and_no_sequences() -> None:
    for sizes in [(0, 1), (1, 0)]:
        sequences, steps = sizes
        states, last = chain(*zeros((sequences, steps, 1, 16, 4), (sequences, steps, 1, 1, 1), (sequences, 1, 16, 4)))
        assert states.shape == (sequences, steps, 1, 16, 4) and last.shape == (sequences, 1, 16, 4)
        assert last.eq(0).all()


def test_equal_inputs_give_equal_bits() -> None:
    inputs = draw([(B, N, H, 16, 32), (B, N, H, 16, 32), (B, N, H, 32, 16), (B, N, H, 1, 1), (B, H, 32, 32)])
    first, second = (delta_chain(*inputs[:4], None, inputs[4]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_equals_the_loop(function: Function, shapes: list[tuple[int, ...]], *options: bool) -> None:
    """Values and gradients of the kernels in fp32 against the loop's in float64, which `delta_chain` leaves to it."""
    inputs = draw(shapes)
    assert serves(inputs[-1], products=True)
    assert_close(outcome(function, inputs, *options), outcome(function, exact(inputs), *options), 1e-5)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    assert max(errors) < tolerance, errors


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def outcome(function: Function, inputs: list[Tensor], *options: bool) -> list[Tensor]:
    results = function(*inputs, *options)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in results]
    return [*results, *torch.autograd.grad(sum((x * w).sum() for x, w in zip(results, weights, strict=True)), inputs)]


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Numbers under which a chain neither grows nor dies out."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype).requires_grad_()
        for shape in shapes
    ]


def zeros(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape, device=DEVICE) for shape in shapes]
