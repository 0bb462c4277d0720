"""The convolution against its equation, and a plan that has it early and attention late."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.model.common import double, tokens_of
from tests.model.mixers.common import assert_equals_slow_form
from tostlm.model import ModelConfig, create_lm, state_bytes
from tostlm.model.mixers.conv import Conv, ConvOptions
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.window import WindowOptions
from tostlm.model.parts import short_conv


def by_token(mixer: Conv, x: Tensor, starts: Tensor) -> Tensor:
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        inputs: list[Tensor] = []  # of the document
        ys = []
        for token, begin in zip(sequence, begins, strict=True):
            inputs = [*([] if begin else inputs), mixer.in_proj.weight @ token]
            near = inputs[::-1][: mixer.options.taps]
            y = torch.stack([mixer.conv.weight[:, -1 - back] * near[back] for back in range(len(near))]).sum(0)
            y = y * torch.sigmoid(y) * torch.sigmoid(mixer.gate_proj.weight @ token)
            ys.append(mixer.out_proj.weight @ y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize("cached", [short_conv.CACHED, 24 * 2 * 7, 1], ids=["whole", "blocks", "tokens"])
@pytest.mark.parametrize("taps", [2, 4, 8])
def test_equals_the_equation(taps: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens a CPU's caches hold at once."""
    monkeypatch.setattr(short_conv, "CACHED", cached)
    mixer = double(ModelConfig(1, 24, 3, 40, positions=None, layers=(ConvOptions(taps=taps),))).blocks[0].mixer
    assert isinstance(mixer, Conv)
    assert_equals_slow_form(mixer, partial(by_token, mixer), 30, ([5, 6, 20], [17]))


@pytest.mark.parametrize("taps", [1, 9])
def test_impossible_taps(taps: int) -> None:
    with pytest.raises(ValueError, match=f"taps {taps} must be from 2 to 8"):
        ConvOptions(taps=taps)


def test_a_plan_of_early_convolutions_and_late_attention_trains() -> None:
    """AsCAN's asymmetry (arXiv 2411.04967): attention is rare at first and the rule at last."""
    conv, near, full = ConvOptions(), WindowOptions(window_tokens=8), SoftmaxOptions(rotary_base=10_000.0)
    plan = (conv, conv, conv, conv, conv, conv, near, conv, near, near, full, full)
    config = ModelConfig(12, 24, 3, 40, positions=None, layers=plan, layer_scale=None)
    lm, tokens = create_lm(config, 0), tokens_of(config, 2, 40)
    assert [options.mixer for options in config.layer_plan] == [options.mixer for options in plan]
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss, state = lm(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in lm.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert state.nbytes / 2 == state_bytes(config, 39) == 4 * 24 * (7 * 3 + 3 * 2 * 7 + 2 * 2 * 39)
