"""Decays of each channel by any factor are fp32's to compute: nothing overflows, and nothing that matters is lost."""

import pytest
import torch
from torch import Tensor

from tostlm.model.parts.channel_decays import add_decaying_outer_products, generalized_delta_rule
from tostlm.model.positions import SequencePositions

B, T, H, D = 2, 200, 2, 16
NO_STARTS = SequencePositions.build(torch.zeros(B, T, dtype=torch.long), 0, None, None, False)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_token(q: Tensor, p: Tensor, b: Tensor, k: Tensor, v: Tensor, log_decays: Tensor) -> Tensor:
    S, ys = q.new_zeros(B, H, D, D), []
    for t in range(T):
        read = (p[:, t, :, :, None] * S).sum(-2, keepdim=True)
        S = log_decays[:, t, :, :, None].exp() * S - b[:, t, :, :, None] * read + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append((q[:, t, :, :, None] * S).sum(-2))
    return torch.stack(ys, 1)


def assert_close(found: Tensor, exact: Tensor, found_leaves: list[Tensor], exact_leaves: list[Tensor]) -> None:
    wanted = draw(*exact.shape, seed=9)
    pairs = zip(
        [found, *torch.autograd.grad(found, found_leaves, wanted)],
        [exact, *torch.autograd.grad(exact, exact_leaves, wanted.double())],
        strict=True,
    )
    for x, y in pairs:
        assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_sums_of_decays_of_any_size(scale: float) -> None:
    q, k, v = (draw(B, T, H, D, seed=seed) for seed in range(3))
    log_decays = -scale * draw(B, T, H, D, seed=3).square()
    narrow = [x.clone().requires_grad_() for x in (q, k, v, log_decays)]
    wide = [x.double().requires_grad_() for x in (q, k, v, log_decays)]
    found, _ = add_decaying_outer_products(*narrow, NO_STARTS, None)
    nothing = torch.zeros_like(wide[0])
    assert_close(found, by_token(wide[0], nothing, nothing, *wide[1:]), narrow, wide)


@pytest.mark.parametrize("log_decay", [0.0, -0.6065, -1.0])
def test_the_delta_rule_at_its_fastest_decays(log_decay: float) -> None:
    q, p, k, v = (draw(B, T, H, D, seed=seed) for seed in range(4))
    p = p / p.norm(dim=-1, keepdim=True)
    b = p * draw(B, T, H, D, seed=4).sigmoid() * torch.tensor(log_decay).exp()
    inputs = (q, p, b, k, v, torch.full((B, T, H, D), log_decay))
    narrow, wide = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    found, _ = generalized_delta_rule(*narrow, NO_STARTS, None)
    assert_close(found, by_token(*wide), narrow, wide)
