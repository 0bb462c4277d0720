"""Muon against torch's own, and over ranks against one process."""

from typing import Literal

import pytest
import torch

from tostlm.optim import MATRICES, MatrixShard, Muon, MuonRule
from tostlm.optim.orthogonalize import orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (5, 17), (17, 5), (3, 20, 6)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices, 5, torch.float64)
    inner = u.mT @ found @ v.mT
    s = inner.diagonal(dim1=-2, dim2=-1)
    assert s.min() > 0.5 and s.max() < 1.3
    torch.testing.assert_close(inner, torch.diag_embed(s))


@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("adamw_rms", "match_rms_adamw")])
def test_equals_torchs_own(scale: Literal["spectral", "adamw_rms"], theirs: str) -> None:
    torch.manual_seed(0)
    start = [torch.randn(6, 10), torch.randn(10, 6), torch.randn(5)]
    own = [x.clone().requires_grad_() for x in start]
    other = [x.clone().requires_grad_() for x in start]
    optimizer = Muon(
        [{"kind": MATRICES[0], "params": own[:2], "weight_decay": 0.1}, {"kind": "no_decay", "params": own[2:]}],
        MuonRule(0.95, 5, "bf16", scale, cautious_weight_decay=False, normuon_beta2=None),
        lr=0.02,
        weight_decay=0.0,
    )
    optimizer.bind([MatrixShard("", tuple(x.shape), 1, x, 0, (range(x.numel()),)) for x in own[:2]])
    muon = torch.optim.Muon(other[:2], lr=0.02, weight_decay=0.1, adjust_lr_fn=theirs)
    adamw = torch.optim.AdamW(other[2:], lr=0.02, weight_decay=0.0)
    for _ in range(5):
        for parameters in (own, other):
            loss = (parameters[0] @ parameters[1]).square().mean() + (parameters[2] - 1).square().sum()
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g
        optimizer.step()
        muon.step()
        adamw.step()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
