"""The heart: whole == pieces == steps == reference, in values, end state and every gradient."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.tssa.common import Operator, assert_same, draw, in_pieces, outcome, reference
from tostlm.tssa import Inputs, State, dispatch, operator, tssa, tssa_statistics

ALL = ("rho", "documents", "state")


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 63, 100])
@pytest.mark.parametrize("bias", ["none", "shared", "own"])
@pytest.mark.parametrize("options", [(), ("rho",), ("documents",), ("state",), ALL], ids="+".join)
def test_equals_the_reference(T: int, bias: str, options: tuple[str, ...]) -> None:
    inputs = draw(T=T, bias=bias, options=options)
    assert_same(outcome(tssa, inputs), outcome(reference, inputs))


def test_equals_the_reference_over_several_blocks() -> None:
    inputs = draw(B=1, T=2100, H=2, D=2, bias="shared", options=ALL)
    assert_same(outcome(tssa, inputs), outcome(reference, inputs), tolerance=1e-8)


@settings(max_examples=40)
@given(data=st.data(), T=st.integers(2, 90), seed=st.integers(0, 9))
def test_pieces_equal_the_whole(data: st.DataObject, T: int, seed: int) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=5)))
    inputs = draw(T=T, bias="own", options=ALL, seed=seed)
    assert_same(outcome(in_pieces(cuts), inputs), outcome(tssa, inputs))


def test_single_steps_equal_the_whole() -> None:
    inputs = draw(T=40, bias="shared", options=("rho", "state"))
    assert_same(outcome(in_pieces(range(1, 40)), inputs), outcome(tssa, inputs))


@pytest.mark.parametrize("operator", [tssa, reference])
def test_gradients_are_derivatives(operator: Operator) -> None:
    inputs = draw(B=2, T=9, H=3, D=2, bias="own", options=("rho", "state"))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 4] = mask[1, 0] = True

    def function(w: Tensor, temp: Tensor, bias: Tensor, rho: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, after = operator(w, temp, bias, rho, mask, State(*state))
        return y, *after

    assert torch.autograd.gradcheck(function, inputs.differentiable())


def test_a_document_start_hides_what_is_before() -> None:
    first, second = draw(T=20, options=("rho",), seed=1), draw(T=30, options=("rho",), seed=2)
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[:, 20] = True
    packed, end = tssa(torch.cat([first.w, second.w], 1), first.temp, None, first.rho, mask)
    alone, alone_end = tssa(second.w, first.temp, None, first.rho)
    assert_same([packed[:, 20:], *end], [alone, *alone_end])


def test_the_future_changes_nothing() -> None:
    inputs = draw(T=64, options=("rho",))
    changed = inputs.w.detach().clone()
    changed[:, 40:] = 7.0
    assert torch.equal(tssa(changed, *inputs[1:])[0][:, :40], tssa(*inputs)[0][:, :40])


def test_the_literal_operator_is_the_authors() -> None:
    """The formula of the released code, over [B, H, T, D] with torch.cumsum."""
    inputs = draw(T=50, bias="shared")
    B, T, H, D = 2, 50, 3, 4
    w = inputs.w.view(B, T, H, D).transpose(1, 2)
    square = w**2
    normed = square / square.cumsum(-2).clamp_min(1e-12) + inputs.bias.t()[None, :, :, None]
    Pi = torch.softmax(normed.sum(-1) * inputs.temp[:, None], dim=1)
    dots = (square * Pi[..., None]).cumsum(-2) / (Pi.cumsum(-1) + 1e-8)[..., None]
    y = (-(w * Pi[..., None]) / (1 + dots)).transpose(1, 2).reshape(B, T, H * D)
    torch.testing.assert_close(tssa(*inputs)[0], y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_costs_its_own_rounding_alone(dtype: torch.dtype, tolerance: float) -> None:
    inputs = draw(T=200, bias="shared", options=("rho",))
    low = inputs._replace(**{name: getattr(inputs, name).detach().to(dtype).requires_grad_() for name in ("w", "temp")})
    exact = low._replace(w=low.w.detach().double().requires_grad_(), temp=low.temp.detach().double().requires_grad_())
    found, expected = outcome(tssa, low), outcome(reference, exact)
    assert found[0].dtype == dtype
    assert found[4].dtype == dtype  # the gradient of w
    for a, b in zip(found[:5], expected[:5], strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < tolerance


def test_the_carry_does_not_lose_tokens_over_a_long_context() -> None:
    """A running sum in fp32 stalls where its terms fall below its spacing; the state must not."""
    w = torch.ones(1, 200_000, 2)
    w[:, 0] = 300.0  # 90,000 of energy, whose fp32 spacing is 1/128
    w[:, 1:] = 0.05  # 0.0025 each
    _, state = tssa(w, torch.ones(1))
    expected = 90_000 + 199_999 * w[0, 1, 0].double() ** 2
    torch.testing.assert_close(state.energy[0, 0], expected, rtol=2e-6, atol=0)  # fp32 would be 5e-3 off


def test_degenerate_inputs() -> None:
    temp = torch.ones(2)
    empty, state = tssa(torch.zeros(3, 0, 4), temp)
    assert empty.shape == (3, 0, 4)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in state)
    for dtype in (torch.float32, torch.float64):  # of the fastest backend and of torch's
        assert tssa(torch.zeros(0, 9, 4, dtype=dtype), temp)[0].shape == (0, 9, 4)
    assert torch.equal(tssa(torch.zeros(1, 5, 4), temp)[0], torch.zeros(1, 5, 4))
    for scale in (1e18, 1e-30):
        assert tssa(torch.full((1, 40, 4), scale), temp)[0].isfinite().all()


def test_nan_in_one_sequence_stays_there() -> None:
    w = torch.randn(2, 70, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = tssa(w, torch.ones(3))[0][1]
    w[0, 3, 2] = torch.nan
    poisoned = w.requires_grad_()
    y, _ = tssa(poisoned, torch.ones(3))
    y[1].sum().backward()
    assert torch.equal(y[1], clean)
    assert poisoned.grad is not None
    assert poisoned.grad[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": torch.zeros(4, 5)}, "w has shape (4, 5)"),
        ({"temp": torch.ones(5)}, "heads dividing 12"),
        ({"bias": torch.zeros(7, 3)}, "bias has shape (7, 3)"),
        ({"rho": torch.ones(1)}, "rho has shape (1,)"),
        ({"document_start_mask": torch.zeros(2, 3, dtype=torch.bool)}, "document_start_mask has shape (2, 3)"),
        ({"state": State.zeros(2, 12, 4)}, "state.mass has shape (2, 4)"),
        ({"w": torch.zeros(2, 33, 12, dtype=torch.int64)}, "w is torch.int64; it must be a floating-point tensor"),
        ({"document_start_mask": torch.zeros(2, 33)}, "document_start_mask is torch.float32; it must be torch.bool"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, object], words: str) -> None:
    arguments = {"w": torch.zeros(2, 33, 12), "temp": torch.ones(3), **change}
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        tssa(**arguments)


def test_states_are_chosen_repeated_and_kept(tmp_path: Path) -> None:
    inputs = draw(B=3)
    _, state = tssa(*inputs)
    chosen = state.select(torch.tensor([2, 0, 0]))
    assert torch.equal(chosen.energy, state.energy[[2, 0, 0]])
    assert torch.equal(chosen.mass, state.mass[[2, 0, 0]])
    assert torch.equal(state.repeat(2).weighted, state.weighted[[0, 0, 1, 1, 2, 2]])
    assert state.energy.requires_grad
    assert not state.detach().energy.requires_grad
    assert state.nbytes == 3 * 8 * (2 * 12 + 3)
    state.detach().save(tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(State.load(tmp_path / "state"), state, strict=True))
    assert state.to("meta").mass.is_meta


def test_one_prefix_goes_on_in_several_ways() -> None:
    inputs = draw(B=1, T=30, options=("rho",))
    _, state = tssa(*inputs)
    ways = torch.randn(4, 10, 12, dtype=torch.float64)
    together, _ = tssa(ways, inputs.temp, None, inputs.rho, state=state.repeat(4))
    for way in range(4):
        alone, _ = tssa(torch.cat([inputs.w, ways[way : way + 1]], 1), inputs.temp, None, inputs.rho)
        torch.testing.assert_close(together[way], alone[0, 30:])


def test_statistics_say_what_the_operator_did() -> None:
    inputs = draw(B=2, T=70, options=("rho", "documents"))
    stats = tssa_statistics(Inputs(*inputs[:5]), inputs.state)

    B, T, H, D = 2, 70, 3, 4
    Pi, gate, horizon = torch.zeros(B, T, H), torch.zeros(B, T, H, D), torch.zeros(B, T, H)
    w = inputs.w.detach().view(B, T, H, D)
    energy, weighted, mass, count = torch.zeros(B, H, D), torch.zeros(B, H, D), torch.zeros(B, H), torch.zeros(B, H)
    for t in range(T):
        decay = inputs.rho.detach() * ~inputs.document_start_mask[:, t, None]
        energy = decay[..., None] * energy + w[:, t] ** 2
        Pi[:, t] = torch.softmax(inputs.temp.detach() * (w[:, t] ** 2 / energy).sum(-1), -1)
        weighted = decay[..., None] * weighted + Pi[:, t, :, None] * w[:, t] ** 2
        mass, count = decay * mass + Pi[:, t], decay * count + 1
        gate[:, t] = 1 / (1 + weighted / mass[..., None])
        horizon[:, t] = count
    weight = w**2 * Pi[..., None]
    torch.testing.assert_close(stats.membership.float(), Pi.mean((0, 1)))
    entropy = -(Pi * Pi.log()).sum(-1).mean() / math.log(H)
    torch.testing.assert_close(stats.entropy.float(), entropy)
    expected_gate = ((gate * weight).sum((0, 1, 3)) / weight.sum((0, 1, 3))).float()
    torch.testing.assert_close(stats.gate.float(), expected_gate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.horizon.float(), horizon.mean((0, 1)))


def test_torch_sees_one_operator() -> None:
    """Schema, fake kernel and backward agree, and torch.compile breaks no graph."""
    inputs = draw(T=70, bias="shared", options=ALL)
    torch.library.opcheck(operator.forward, (*inputs[:5], *inputs.state, None))
    torch.library.opcheck(operator.forward, (*draw(T=40)[:5], *State.zeros(2, 12, 3), "torch"))
    compiled = torch.compile(lambda w, temp: tssa(w, temp)[0] * 2, fullgraph=True, backend="aot_eager")
    w, temp = inputs.w, inputs.temp
    found, expected = compiled(w, temp), tssa(w, temp)[0] * 2
    assert_same([found], [expected])
    assert_same(list(torch.autograd.grad(found.sum(), (w, temp))), list(torch.autograd.grad(expected.sum(), (w, temp))))


def test_a_second_derivative_is_an_error() -> None:
    w = torch.randn(1, 9, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(tssa(w, torch.ones(2))[0].square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="register_autograd"):
        torch.autograd.grad(grad.sum(), w)


def test_under_autocast_and_activation_checkpointing() -> None:
    inputs = draw(T=70)
    w, temp = inputs.w.detach().float().requires_grad_(), inputs.temp.detach().float().requires_grad_()
    plain = torch.autograd.grad(tssa(w, temp)[0].sum(), (w, temp))
    again = torch.autograd.grad(checkpoint(lambda w: tssa(w, temp)[0], w, use_reentrant=False).sum(), (w, temp))
    assert_same(list(again), list(plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = tssa(w.bfloat16(), temp)
    assert (y.dtype, state.energy.dtype) == (torch.bfloat16, torch.float64)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_the_environment_names_the_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(T=40, options=("rho", "state"))
    expected = outcome(reference, inputs)
    monkeypatch.setenv("TOSTLM_TSSA_BACKEND", name)
    assert_same(outcome(tssa, inputs), expected)


def test_a_backend_that_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSTLM_TSSA_BACKEND", "fortran")
    with pytest.raises(
        ValueError, match=r"TOSTLM_TSSA_BACKEND=fortran: .* is not available here; use triton, cpp, torch"
    ):
        tssa(*draw())


def test_which_backend_serves_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._choose.cache_clear()
    with caplog.at_level("INFO", logger="tostlm"):
        tssa(*draw())
        tssa(*draw())
    assert [record.message.split(": ")[-1] for record in caplog.records] == ["backend torch"]


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "", "/bin/false"])
def test_without_a_compiler_torch_serves(compiler: str, tmp_path: Path) -> None:
    script = """
import logging, torch
from tostlm.tssa import tssa
from tostlm.tssa.dispatch import choose
logging.basicConfig(format="%(levelname)s %(message)s")
for _ in range(2):
    tssa(torch.ones(1, 3, 32), torch.ones(2))
print(choose(torch.ones(1, 3, 32), 2).name)
"""
    environment = {k: v for k, v in os.environ.items() if k != dispatch.VARIABLE}
    environment |= {"CXX": compiler, "PATH": str(tmp_path), "TOSTLM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch"]
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("WARNING the C++ backend of TSSA cannot be built, the torch backend serves instead")
