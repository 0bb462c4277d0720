"""RWKV-7's time mixing against its equations, token by token."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.common import double
from tests.model.mixers.common import assert_equals_slow_form
from tostlm.model import ModelConfig, create_lm, parameter_groups
from tostlm.model.mixers.rwkv7 import RWKV7Options

H, D = 3, 8
C = H * D


def low_rank(part: Any, x: Tensor) -> Tensor:
    inside = part.down.weight @ x
    y = part.up.weight @ (inside if part.inside is None else part.inside(inside))
    return y if part.offset is None else y + part.offset


def by_token(mixer: Any, x: Tensor, starts: Tensor) -> Tensor:
    """The equations of the paper's section 4, a sequence, a token and a head at a time; S is [values, keys] there."""
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        before, S, ys = x.new_zeros(C), [x.new_zeros(D, D)] * H, []
        for token, begin in zip(sequence, begins, strict=True):
            if begin:
                before, S = x.new_zeros(C), [x.new_zeros(D, D)] * H
            x_r, x_w, x_k, x_v, x_a, x_g = ((1 - mu) * token + mu * before for mu in mixer.shift)
            before = token
            w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(mixer.decay, x_w))).view(H, D)
            a = torch.sigmoid(low_rank(mixer.rate, x_a))
            precursor = mixer.k_proj.weight @ x_k
            removed = (precursor * mixer.removed_scale).view(H, D)
            k = (precursor * (1 - mixer.rate_share + a * mixer.rate_share)).view(H, D)
            r, v = (mixer.r_proj.weight @ x_r).view(H, D), (mixer.v_proj.weight @ x_v).view(H, D)
            a, rho, heads = a.view(H, D), mixer.bonus.view(H, D), []
            S = [*S]
            for h in range(H):
                unit = removed[h] / removed[h].norm()
                S[h] = S[h] @ (torch.diag(w[h]) - torch.outer(unit, a[h] * unit)) + torch.outer(v[h], k[h])
                y = S[h] @ r[h]
                y = (y - y.mean()) / (y.var(correction=0) + D * 1e-5).sqrt()
                own = slice(h * D, (h + 1) * D)
                heads.append(y * mixer.norm[own] + mixer.norm_offset[own] + (r[h] * rho[h] * k[h]).sum() * v[h])
            ys.append(mixer.out_proj.weight @ (low_rank(mixer.gate, x_g) * torch.cat(heads)))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"decay_rank": 2, "rate_rank": 3, "gate_rank": 4}], ids=["defaults", "ranks"])
def test_equals_the_equations(options: dict[str, int]) -> None:
    config = ModelConfig(1, C, H, 40, positions=None, layers=(RWKV7Options(**options),))
    mixer = double(config).blocks[0].mixer
    assert_equals_slow_form(mixer, partial(by_token, mixer), 150, ([5, 6, 80], [130]))


def test_starts_where_the_authors_start_and_decays_what_they_decay() -> None:
    lm = create_lm(ModelConfig(1, 768, 12, 40, positions=None, layers=(RWKV7Options(),)), 0).requires_grad_(False)
    mixer: Any = lm.blocks[0].mixer
    assert [part.down.weight.shape[0] for part in (mixer.decay, mixer.rate, mixer.gate)] == [64, 64, 128]
    logits = mixer.decay.offset.tolist()
    assert (logits[0], logits[-1]) == pytest.approx((-8.0, 3.0))
    assert float(mixer.k_proj.weight.std()) == pytest.approx(0.002, rel=0.05)
    names = {parameter: name for name, parameter in mixer.named_parameters()}
    decayed, _ = parameter_groups(lm, weight_decay=0.1)
    projections = {f"{kind}_proj.weight" for kind in ("r", "k", "v", "out")}
    assert {names[p] for p in decayed["params"] if p in names} == projections


@pytest.mark.parametrize("name", ["decay_rank", "rate_rank", "gate_rank"])
def test_options_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0 must be from 1 to .*, or null for the authors' number"):
        RWKV7Options(**{name: 0})
