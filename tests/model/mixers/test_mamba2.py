"""Mamba-2 against its equations, token by token."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.common import double
from tests.model.mixers.common import assert_equals_slow_form, convolved
from tostlm.model import ModelConfig, create_lm
from tostlm.model.mixers.mamba2 import Mamba2Options

H, D = 3, 8
C = H * D


def by_token(mixer: Any, x: Tensor, starts: Tensor) -> Tensor:
    """The equations of the paper's block, a sequence, a token and a head at a time."""
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        inputs: list[Tensor] = []  # of the document, before the convolution
        S, ys = [x.new_zeros(D, D)] * H, []
        for token, begin in zip(sequence, begins, strict=True):
            if begin:
                inputs, S = [], [x.new_zeros(D, D)] * H
            z, vkq, pace = (mixer.in_proj.weight @ token).split([C, C + 2 * D, H])
            inputs.append(vkq)
            v, k, q = convolved(mixer.conv, inputs).split([C, D, D])
            heads = []
            for h in range(H):
                dt = torch.log1p(torch.exp(pace[h] + mixer.step_offset[h]))
                own = v[h * D : (h + 1) * D]
                S = [*S]
                S[h] = torch.exp(-mixer.log_rate[h].exp() * dt) * S[h] + torch.outer(k, dt * own)
                heads.append(S[h].T @ q + mixer.skip[h] * own)
            y = torch.cat(heads) * z * torch.sigmoid(z)
            ys.append(mixer.out_proj.weight @ (mixer.norm * y / (y.square().mean() + 1e-5).sqrt()))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize("taps", [4, 1, 0])
def test_equals_the_equations(taps: int) -> None:
    config = ModelConfig(1, C, H, 40, positions=None, layers=(Mamba2Options(short_conv=taps),))
    mixer = double(config).blocks[0].mixer
    assert_equals_slow_form(mixer, partial(by_token, mixer), 150, ([5, 6, 80], [130]))


def test_starts_where_the_authors_start() -> None:
    config = ModelConfig(1, 640, 320, 40, positions=None, layers=(Mamba2Options(),))
    mixer: Any = create_lm(config, 0).blocks[0].mixer
    steps, rates = F.softplus(mixer.step_offset), mixer.log_rate.exp()
    assert 0.001 <= steps.min() < 0.0015 < 0.08 < steps.max() <= 0.1001
    assert 1 <= rates.min() < 1.5 < 15.5 < rates.max() <= 16.001
