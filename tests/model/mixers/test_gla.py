"""Gated linear attention against its equations, token by token."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.common import double
from tests.model.mixers.common import assert_equals_slow_form, convolved
from tostlm.model import ModelConfig
from tostlm.model.mixers.gla import GLAOptions

H, D = 3, 8
C = H * D


def by_token(mixer: Any, x: Tensor, starts: Tensor) -> Tensor:
    """The equations of the paper's section 4, a sequence, a token and a head at a time."""
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        inputs: list[Tensor] = []  # of the document, before the convolution
        S, ys = [x.new_zeros(D, D)] * H, []
        for token, begin in zip(sequence, begins, strict=True):
            if begin:
                inputs, S = [], [x.new_zeros(D, D)] * H
            inputs.append(mixer.in_proj.weight @ token)
            q, k, v = convolved(mixer.conv, inputs).view(3, H, D)
            logits = mixer.decay.up.weight @ (mixer.decay.down.weight @ token) + mixer.decay.offset
            a = (torch.sigmoid(logits) ** (1 / mixer.options.gate_temperature)).view(H, D)
            S = [a[h][:, None] * S[h] + torch.outer(k[h], v[h]) for h in range(H)]
            heads = [S[h].T @ q[h] / D**0.5 for h in range(H)]
            y = torch.cat([y / (y.square().mean() + 1e-4).sqrt() for y in heads]) * mixer.output.norm
            gate = mixer.output.gate_proj.weight @ token
            ys.append(mixer.output.out_proj.weight @ (y * gate * torch.sigmoid(gate)))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options", [{}, {"gate_temperature": 0.5, "gate_rank": 2}, {"short_conv": 3}], ids=["paper", "fast", "convolved"]
)
def test_equals_the_equations(options: dict[str, Any]) -> None:
    config = ModelConfig(1, C, H, 40, positions=None, layers=(GLAOptions(**options),))
    mixer = double(config).blocks[0].mixer
    assert_equals_slow_form(mixer, partial(by_token, mixer), 150, ([5, 6, 80], [130]))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gate_rank": 0}, "gate_rank 0 must be from 1 to"),
        ({"gate_temperature": 0.0}, "gate_temperature 0.0 must be positive; the paper's is 16"),
        ({"short_conv": 9}, "short_conv 9 must be from 0 to 8 taps"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GLAOptions(**values)
