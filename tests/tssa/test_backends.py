"""Every compiled backend against the reference: values, end state and every gradient."""

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.tssa.common import Arguments, draw, in_pieces, outcome, reference
from tostlm.tssa import Inputs, State, cpp, tssa
from tostlm.tssa.dispatch import VARIABLE, choose
from tostlm.tssa.operator import forward as custom_op

BACKENDS = ["cpp", "torch"]
D = 16
ALL = ("rho", "documents", "state")
# T, B, H, bias, options
CASES = [
    *((T, B, 3, "own", options) for T in (1, 2, 31, 33, 63, 127, 128, 129) for B in (1, 3) for options in ((), ALL)),
    *((129, 3, H, bias, options) for H in (1, 4) for bias in ("none", "shared") for options in ((), ("rho",), ALL)),
    *((70, 2, 2, "shared", (option,)) for option in ALL),
    *((1000, B, 3, "shared", ALL) for B in (1, 3)),
]
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 4e-3}  # of y and dw, relative to their size


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    monkeypatch.setattr(cpp, "ELEMENTS_PER_THREAD", 1)  # as many threads as are allowed, for the shortest text
    try:
        choose(torch.zeros(1, 1, D), 1)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def inputs(T: int, B: int, H: int, bias: str, options: tuple[str, ...]) -> Arguments:
    """In float64, each number one that the narrower dtypes hold; the memberships are not saturated."""
    drawn = draw(B, T, H, D, bias, options)
    changed = {"w": drawn.w.detach().bfloat16(), "temp": drawn.temp.detach().float() / 4}
    if drawn.bias is not None:
        changed["bias"] = (drawn.bias.detach() / D).float()
    if drawn.rho is not None:
        changed["rho"] = drawn.rho.detach().float()
    return drawn._replace(**{name: x.double().requires_grad_() for name, x in changed.items()})


@functools.cache
def expected(*case: object) -> list[Tensor]:
    return outcome(reference, inputs(*case))


def narrowed(full: Arguments, dtype: torch.dtype) -> Arguments:
    """w in that dtype, parameters in fp32 as models keep them."""
    names = ("temp", "bias", "rho")
    narrow = {name: x.detach().float() for name in names if (x := getattr(full, name)) is not None}
    narrow["w"] = full.w.detach().to(dtype)
    return full._replace(**{name: x.requires_grad_() for name, x in narrow.items()})


def error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    size = exact.norm()
    return float((found - exact).norm() / (size if size > 0 else 1))


def assert_near(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Each within what its own dtype and the fp32 arithmetic before it cost."""
    for index, (a, b) in enumerate(zip(found, exact, strict=True)):
        stored = ROUNDING[a.dtype] if a.dtype in ROUNDING else ROUNDING[torch.float32]
        assert error(a, b) <= max(stored, 1e-5 if index > 3 else 0), f"output {index}: {error(a, b)}"
    assert found[0].dtype == found[4].dtype == dtype


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: tuple[object, ...], dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    assert_near(outcome(tssa, narrowed(inputs(*case), dtype)), expected(*case), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_state_gradients_from_what_is_saved(case: tuple[object, ...], dtype: torch.dtype) -> None:
    drawn = narrowed(inputs(*case), dtype)
    operands = Inputs(*(None if x is None else x.detach() for x in drawn[:5]))
    B, _, H, _ = operands.sizes
    zeros = State.zeros(B, H * D, H)
    state = zeros if drawn.state is None else State(*(x.detach() for x in drawn.state))
    backend = choose(operands.w, H)
    y, _, saved = backend.forward(operands, state)
    assert error(backend.outputs(operands, saved), y) <= ROUNDING[dtype]
    grad_y = torch.sin(torch.arange(y.numel())).to(dtype).view_as(y)
    found = backend.state_grads(operands, saved, grad_y)
    expected_grads = backend.backward(operands, saved, grad_y, zeros, False).state[1:]
    for a, b in zip(found, expected_grads, strict=True):
        assert a.dtype == torch.float64
        assert error(a, b) < 1e-5


# Each width is compiled for itself.
@pytest.mark.parametrize(
    "heads_of", [64, 80, 256, *(pytest.param(width, marks=pytest.mark.slow) for width in (32, 48, 128))]
)
def test_every_head_width(heads_of: int) -> None:
    drawn = draw(2, 70, 2, heads_of, options=ALL)
    exact = drawn._replace(w=drawn.w.detach().bfloat16().double().requires_grad_(), rho=None)
    exact = exact._replace(temp=(drawn.temp.detach() / heads_of).float().double().requires_grad_())
    assert_near(outcome(tssa, narrowed(exact, torch.float32)), outcome(reference, exact), torch.float32)


@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_every_vector_width(march: str, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend != "cpp" or os.uname().machine != "x86_64":
        pytest.skip("for the C++ backend on x86-64")
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, f"-march={march}"))
    monkeypatch.setattr(cpp, "_library", functools.cache(cpp._library.__wrapped__))
    case = (129, 3, 3, "own", ALL)
    for dtype in (torch.float32, torch.bfloat16):
        assert_near(outcome(tssa, narrowed(inputs(*case), dtype)), expected(*case), dtype)


def test_no_tokens_change_nothing() -> None:
    drawn = narrowed(draw(2, 0, 3, D, "own", ALL), torch.float32)
    y, state = tssa(*drawn)
    assert y.shape == (2, 0, 3 * D)
    assert all(torch.equal(a, b) for a, b in zip(state, drawn.state, strict=True))
    output_grads = [torch.full_like(x, 2.0) for x in state]
    gradients = torch.autograd.grad([*state], [drawn.temp, *drawn.state], output_grads)
    assert torch.equal(gradients[0], torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(gradients[1:], output_grads, strict=True))


@pytest.mark.parametrize("B", [1, 3])
def test_the_number_of_threads_changes_no_bit(B: int) -> None:
    case = narrowed(inputs(300, B, 3, "own", ALL), torch.float32)
    torch.set_num_threads(1)
    alone = outcome(tssa, case)
    for threads in (2, 3, 4, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(outcome(tssa, case), alone, strict=True))


def test_pieces_equal_the_whole() -> None:
    case = (300, 2, 3, "own", ALL)
    found = outcome(in_pieces([1, 2, 64, 100, 163, 299]), narrowed(inputs(*case), torch.float32))
    assert_near(found, outcome(tssa, narrowed(inputs(*case), torch.float32)), torch.float32)


def test_single_steps_equal_the_whole() -> None:
    case = (70, 2, 3, "shared", ("rho", "state"))
    with torch.no_grad():
        found = in_pieces(range(1, 70))(*narrowed(inputs(*case), torch.float32))
    assert error(found[0], expected(*case)[0]) < ROUNDING[torch.float32]


def test_bf16_differs_from_fp32_by_the_rounding_of_its_results_alone() -> None:
    full = inputs(129, 3, 3, "own", ALL)
    narrow, wide = (outcome(tssa, narrowed(full, dtype)) for dtype in (torch.bfloat16, torch.float32))
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_strided_inputs() -> None:
    full = narrowed(inputs(70, 2, 2, "shared", ("state",)), torch.float32)
    w = torch.empty(2, 2 * D, 70).transpose(1, 2).copy_(full.w.detach()).requires_grad_()
    state = State(*(x.detach().t().contiguous().t().requires_grad_() for x in full.state))
    bias = full.bias.detach().t().contiguous().t().requires_grad_()
    for a, b in zip(outcome(tssa, full._replace(w=w, bias=bias, state=state)), outcome(tssa, full), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_one_sequence_stays_there(dtype: torch.dtype) -> None:
    clean = narrowed(inputs(129, 3, 3, "own", ALL), dtype)
    poisoned = clean._replace(w=clean.w.detach().clone())
    poisoned.w[0, 3, 2] = torch.nan
    poisoned.w.requires_grad_()
    for index, (a, b) in enumerate(zip(outcome(tssa, poisoned), outcome(tssa, clean), strict=True)):
        if a.dim() > 1:
            assert torch.equal(a[1:], b[1:])
        if index in (0, 4):  # y and the gradient of w
            assert a[0].isnan().any()
    assert outcome(tssa, poisoned)[0][0, 3].isnan().all()


def test_no_result_is_read_from_uninitialised_memory() -> None:
    case = narrowed(inputs(129, 3, 3, "own", ALL), torch.float32)
    clean = outcome(tssa, case)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outcome(tssa, case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-6, 1e18])
@pytest.mark.parametrize("T", [40, 1000])
def test_degenerate_inputs(scale: float, T: int) -> None:
    w = torch.full((1, T, 2 * D), scale, requires_grad=True)
    y, _ = tssa(w, torch.ones(2))
    exact, _ = reference(w, torch.ones(2))
    y.sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()
    assert y.isfinite().all()
    if T * scale**2 < torch.finfo(torch.float32).max:
        assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-37)


def test_a_first_token_has_no_gradient_through_its_share() -> None:
    """Its share of the energy is 1 whatever it is, and a rounding of that would be large where w is small."""
    w = torch.full((1, 1, 2 * D), 1e-4)
    w[..., D:] = 2e-4
    gradients = []
    for operator in (tssa, reference):
        x = w.clone().requires_grad_()
        operator(x, torch.tensor([1.0, 0.9]))[0][..., :5].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_the_error_does_not_grow_with_the_context() -> None:
    w = torch.randn(1, 100_000, 2 * D, generator=torch.Generator().manual_seed(0))
    found, _ = tssa(w, torch.ones(2))
    exact, _ = _in_float64(w)
    assert error(found[:, -10_000:], exact[:, -10_000:]) < 2e-7


def _in_float64(w: Tensor) -> tuple[Tensor, State]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "torch")
        return tssa(w.double(), torch.ones(2))


def test_memory_is_linear_in_the_context(backend: str) -> None:
    """Beside w and dy both passes have y, dw, what is saved, and what a pass works in alive at once."""
    short, long = (_peak_bytes(T) / (T * 128) for T in (4096, 16384))
    assert long <= {"cpp": 4.5, "torch": 18}[backend]
    assert long <= short


def _peak_bytes(T: int) -> int:
    """The most bytes both passes have alive at once over [1, T, 128] in bf16, the inputs not counted."""
    w = torch.ones(1, T, 128, dtype=torch.bfloat16, requires_grad=True)
    dy, temp = torch.ones_like(w), torch.ones(2, requires_grad=True)
    tssa(w, temp)[0].backward(dy)
    w.grad = temp.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tssa(w, temp)[0].backward(dy)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_kernel_describes_the_results(dtype: torch.dtype, backend: str) -> None:
    for T in (0, 1, 70):
        x = narrowed(draw(2, T, 3, D, "own", ALL), dtype)
        arguments = (*[None if a is None else a.detach() for a in x[:5]], *[a.detach() for a in x.state], backend)
        torch.library.opcheck(custom_op, arguments, test_utils=("test_schema", "test_faketensor"))
