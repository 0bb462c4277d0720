"""The loss over rows of logits at a time: what it keeps of their precision, and how much memory it takes."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tostlm.model.loss import IGNORE, Sizes, mean_cross_entropy

N, C, V = 40, 24, 300


class CopiesOf(TorchDispatchMode):
    """Counts the tensors of a shape that are made by conversion to another dtype."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten._to_copy.default and tuple(result.shape) == self.shape
        return result


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((N, C), (V, C)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = IGNORE
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tostlm.model.loss.CPU", Sizes(17 * 2 * V, 3 * 4 * V))


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_rounds_the_products_and_nothing_else(autocast: bool) -> None:
    x, weight, targets = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), CopiesOf(V, C) as copies:
        loss = mean_cross_entropy(x, weight, targets)
    assert copies.count == autocast  # the weight is converted once, not for every chunk
    found = torch.autograd.grad(loss, (x, weight))
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, weight)]
    logits = (rounded[0] @ rounded[1].t()).bfloat16().double()  # with the gradient of what was rounded
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0)
    for ours, wanted in zip(found, torch.autograd.grad(expected, rounded), strict=True):
        assert ours.dtype == x.dtype
        assert (ours - wanted).norm() < 6e-3 * wanted.norm()


def test_what_ignored_tokens_hold_does_not_count() -> None:
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        x[::5] = torch.tensor([torch.inf, torch.nan, 1e30])[torch.arange(8) % 3, None]
    loss = mean_cross_entropy(x, weight, targets)
    expected = F.cross_entropy((x @ weight.t())[targets != IGNORE], targets[targets != IGNORE])
    torch.testing.assert_close(loss, expected)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert (dx[::5] == 0).all() and dweight.isfinite().all()


def test_a_second_backward_pass_is_an_error() -> None:
    x, weight, targets = inputs(torch.float32)
    loss = mean_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of the loss was made already, in place"):
        loss.backward()


def test_memory_beyond_inputs_and_gradients_is_bounded() -> None:
    script = """
import resource, torch
from tostlm.model.loss import mean_cross_entropy
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def score(rows, V):
    x, weight = torch.randn(rows, 64, requires_grad=True), torch.randn(V, 64, requires_grad=True)
    targets = torch.randint(V, (rows,))
    before = peak()
    mean_cross_entropy(x, weight, targets).backward()
    return peak() - before - x.nbytes - weight.nbytes
score(8, 16)
print(score(8192, 50_304))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 20  # all of the logits are 1.6 GB
