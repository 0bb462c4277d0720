"""The Triton backend == the reference, in values, end state and every gradient.

`test_triton.py` runs this file twice: in Triton's interpreter, which needs no GPU, and on a GPU where there is one.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.tssa.common import Arguments, draw, in_pieces, outcome, reference
from tostlm.tssa import Inputs, State, operator, tssa
from tostlm.tssa.backend import Saved
from tostlm.tssa.dispatch import choose

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ALL = ("rho", "documents", "state")
only_gpu = pytest.mark.skipif(not GPU, reason="too large for the interpreter")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSTLM_TSSA_BACKEND", "triton")


def narrow(inputs: Arguments, dtype: torch.dtype = torch.float32) -> Arguments:
    """On the device; w in `dtype`, the other inputs in fp32 and the state in fp64, as models have them."""

    def to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.detach().to(DEVICE, dtype).requires_grad_(x.requires_grad)

    parameters = [to(x, torch.float32) for x in (inputs.temp, inputs.bias, inputs.rho)]
    state = None if inputs.state is None else State(*(to(x, torch.float64) for x in inputs.state))
    mask = None if inputs.document_start_mask is None else inputs.document_start_mask.to(DEVICE)
    return Arguments(to(inputs.w, dtype), *parameters, mask, state)


def exact(inputs: Arguments) -> Arguments:
    """The same numbers in float64, on the CPU."""

    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().cpu().double().requires_grad_(x.requires_grad)

    state = None if inputs.state is None else State(*(to(x) for x in inputs.state))
    mask = None if inputs.document_start_mask is None else inputs.document_start_mask.cpu()
    return Arguments(*(to(x) for x in inputs[:4]), mask, state)


def outcome_of(operator: object, inputs: Arguments) -> list[Tensor]:
    """`outcome` on the CPU in float64."""
    return [x.detach().cpu().double() for x in outcome(operator, inputs)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    errors = [((a - b).norm() / b.norm().clamp_min(1e-3)).item() for a, b in zip(found, expected, strict=True)]
    assert max(errors) < tolerance, errors


CASES = [
    (2, 1, 3, 16, "own", ALL),  # one token
    (2, 1, 1, 17, "none", ()),
    (2, 33, 3, 20, "none", ()),  # nothing decays; H and D are no powers of two
    (1, 33, 1, 16, "none", ("state",)),
    (2, 64, 2, 16, "shared", ("state",)),
    (1, 40, 2, 16, "own", ALL),
    (1, 35, 2, 16, "shared", ("documents",)),
    *(
        pytest.param(*case, marks=only_gpu)
        for case in [
            (2, 1000, 12, 64, "shared", ALL),
            (3, 333, 5, 100, "own", ("state",)),
            (2, 200, 16, 128, "none", ("rho",)),
            (2, 100, 4, 256, "own", ("rho", "documents")),
            (1, 5000, 2, 16, "none", ("rho", "state")),  # several steps of the kernel that chains chunks
        ]
    ),
]


@pytest.mark.parametrize(("B", "T", "H", "D", "bias", "options"), CASES)
def test_equals_the_reference(B: int, T: int, H: int, D: int, bias: str, options: Sequence[str]) -> None:
    inputs = narrow(draw(B, T, H, D, bias, options))
    assert choose(inputs.w, H).name == "triton"
    assert_close(outcome_of(tssa, inputs), outcome_of(reference, exact(inputs)), 1e-5)


@pytest.mark.parametrize("T", [1, 40])
def test_outputs_and_state_gradients_from_what_is_saved(T: int) -> None:
    inputs = narrow(draw(2, T, 1, 20, "own", ALL))
    operands = Inputs(*(None if x is None else x.detach() for x in inputs[:5]))
    assert inputs.state is not None
    backend = choose(operands.w, 1)
    y, _, saved = backend.forward(operands, State(*(x.detach() for x in inputs.state)))
    torch.testing.assert_close(backend.outputs(operands, saved), y, rtol=1e-5, atol=1e-6)
    zeros = State.zeros(2, 20, 1, DEVICE)
    expected = backend.backward(operands, saved, torch.sin(y), zeros, False).state[1:]
    for a, b in zip(backend.state_grads(operands, saved, torch.sin(y)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_saved_may_have_been_laid_out_anew() -> None:
    w = narrow(draw(1, 33, 2, 16)).w.detach()
    operands, state = Inputs(w, torch.ones(2, device=DEVICE)), State.zeros(1, 32, 2, DEVICE)
    backend = choose(w, 2)
    y, _, saved = backend.forward(operands, state)
    assert saved.Pi.mT.is_contiguous() and saved.chunk_states.mass.mT.is_contiguous()
    anew = Saved(saved.Pi.contiguous(), saved.n.contiguous(), State(*(x.contiguous() for x in saved.chunk_states)))
    found, expected = (backend.backward(operands, x, torch.sin(y), state, False) for x in (anew, saved))
    assert torch.equal(backend.outputs(operands, anew), y)
    assert torch.equal(found.w, expected.w) and torch.equal(found.n, expected.n)


def test_what_torch_expects_of_the_results_is_what_they_are() -> None:
    inputs = narrow(draw(1, 33, 2, 16, "own"))
    operands, state = [x if x is None else x.detach() for x in inputs[:5]], State.zeros(1, 32, 2, DEVICE)
    y, *rest = operator.forward(*operands, *state, None)
    torch.library.opcheck(operator.forward, (*operands, *state, None), test_utils="test_faketensor")
    for saved in (rest[3:], [x.contiguous() for x in rest[3:]]):
        arguments = (*operands, *saved, y, *state, False, None)
        torch.library.opcheck(operator.backward, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("T", [1, 34])
def test_low_precision_costs_its_own_rounding_alone(T: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = narrow(draw(2, T, 2, 16, "shared"), dtype)
    found = outcome(tssa, inputs)
    assert found[0].dtype == found[4].dtype == dtype  # y and the gradient of w
    assert_close([x.detach().cpu().double() for x in found], outcome_of(reference, exact(inputs)), tolerance)


@pytest.mark.parametrize("options", [("state",), pytest.param(ALL, marks=only_gpu)], ids="+".join)
def test_pieces_equal_the_whole(options: tuple[str, ...]) -> None:
    inputs = narrow(draw(2, 71, 2, 16, "own", options))
    assert_close(outcome_of(in_pieces([1, 2, 40]), inputs), outcome_of(tssa, inputs), 1e-5)


def test_small_first_tokens_keep_their_gradients() -> None:
    """Where a document begins the two parts of dn cancel exactly; their rounding would be large where w is small."""
    inputs = draw(1, 34, 2, 16, options=("documents",))
    inputs.document_start_mask.zero_()
    inputs.document_start_mask[0, 9] = True
    scale = torch.ones(34, 1, dtype=torch.float64)
    scale[[0, 9]] = 1e-4
    inputs = narrow(inputs._replace(w=(inputs.w.detach() * scale).requires_grad_()))
    found, expected = (x[4][0, [0, 9]] for x in (outcome_of(tssa, inputs), outcome_of(reference, exact(inputs))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_no_gradient_of_rho_where_none_is_asked_for() -> None:
    inputs = draw(1, 10, 2, 16, options=("rho",))
    inputs = narrow(inputs._replace(rho=inputs.rho.detach()))
    y, _ = tssa(*inputs)
    y.sum().backward()  # its gradient has stride 0
    expected, _ = reference(*(other := exact(inputs)))
    expected.sum().backward()
    assert_close([inputs.w.grad.cpu().double()], [other.w.grad], 1e-5)


def test_equal_inputs_give_equal_bits() -> None:
    inputs = narrow(draw(2, 1000 if GPU else 34, 2, 16, "own", ALL if GPU else ("state",)))
    first, second = outcome(tssa, inputs), outcome(tssa, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 3)])
def test_nothing_at_all(B: int, T: int) -> None:
    found = outcome(tssa, inputs := narrow(draw(B, T, 2, 16, "shared", ("rho", "state"))))
    assert found[0].shape == (B, T, 32)
    assert all(torch.equal(x, start) for x, start in zip(found[1:4], inputs.state, strict=True))
    assert all(x.isfinite().all() for x in found)


def test_views_are_read_as_they_are() -> None:
    wide = narrow(draw(2, 34, 2, 32)).w.detach()
    temp = torch.ones(2, device=DEVICE)
    assert torch.equal(tssa(wide[..., ::2], temp)[0], tssa(wide[..., ::2].contiguous(), temp)[0])


@only_gpu
def test_offsets_beyond_32_bits() -> None:
    w = torch.zeros(9, 2**18, 1024, dtype=torch.bfloat16, device=DEVICE)  # 4.5 GiB, 2.4e9 elements
    w[-1] = torch.randn(2**18, 1024, device=DEVICE)
    temp = torch.ones(16, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(tssa(w, temp)[0][-1], tssa(w[-1:], temp)[0][0])
