"""TSSA's options against their equations, token by token; without them it is the operator."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.common import double, tokens_of
from tests.model.mixers.common import assert_equals_slow_form, draw
from tostlm.model import ModelConfig, create_lm
from tostlm.model.mixers.tssa import TSSA, TSSAOptions, TSSAState
from tostlm.model.parts.forgetting import Forgetting
from tostlm.model.positions import SequencePositions
from tostlm.tssa import Inputs, tssa_reference

H, D, T = 3, 4, 150
STARTS = ([5, 6, 80], [130])
OPTIONS: dict[str, dict[str, Any]] = {
    "selective": {"forgetting": "selective", "halflife_tokens": (2.0, 64.0)},
    "convolved": {"short_conv": 4},
    "own query": {"query": "own"},
    "scale free": {"membership": "scale_free", "forgetting": "ladder"},
    "gated": {"gate": "output", "forgetting": "ladder"},
    "everything": {
        "forgetting": "selective",
        "short_conv": 3,
        "query": "own",
        "membership": "scale_free",
        "gate": "output",
    },
}


def mixer_of(positions: int | None = None, **options: Any) -> TSSA:
    config = ModelConfig(1, H * D, H, 40, positions=positions, layers=(TSSAOptions(**options),))
    mixer = double(config).blocks[0].mixer
    assert isinstance(mixer, TSSA)
    return mixer


def by_token(mixer: TSSA, x: Tensor, starts: Tensor) -> Tensor:
    options: TSSAOptions = mixer.options
    first, last = options.halflife_tokens or (4.0, 4096.0)
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        ys: list[Tensor] = []
        inputs: list[Tensor] = []  # of the document, before the convolution
        for token, begin in zip(sequence, begins, strict=True):
            if begin or not ys:
                inputs, s, m = [], x.new_zeros(H, D), x.new_zeros(H, D)
                c, N = x.new_zeros(H), x.new_zeros(H)
            inputs.append(mixer.in_proj.weight @ token)
            w = inputs[-1]
            if mixer.conv is not None:
                near = inputs[::-1][: options.short_conv]
                w = sum(mixer.conv.weight[:, -1 - back] * near[back] for back in range(len(near)))
            w = w.view(H, D)
            if options.forgetting == "selective":
                f = mixer.forgetting
                a = torch.exp(-f.log_rate.exp() * torch.log1p(torch.exp(f.proj.weight @ token + f.proj.bias)))
            elif options.forgetting == "ladder":
                halflives = [first * (last / first) ** (h / (H - 1)) for h in range(H)]
                a = torch.tensor([0.5 ** (1 / halflife) for halflife in halflives], dtype=torch.float64)
            else:
                a = torch.ones(H, dtype=torch.float64)
            s, N = a[:, None] * s + w**2, a * N + 1
            if options.membership == "scale_free":
                n = D**0.5 * (N * (w**2).sum(-1) / s.sum(-1) - 1)
            else:
                n = (w**2 / s).sum(-1)
            Pi = torch.softmax(mixer.temp * n, 0)
            m, c = a[:, None] * m + Pi[:, None] * w**2, a * c + Pi
            read = w if mixer.query_proj is None else (mixer.query_proj.weight @ token).view(H, D)
            y = (-read * Pi[:, None] / (1 + m / (c + 1e-8)[:, None])).flatten()
            if mixer.gate_proj is not None and mixer.norm is not None:
                y = y / (y.square().mean() + 1e-6).sqrt() * mixer.norm * torch.sigmoid(mixer.gate_proj.weight @ token)
            ys.append(mixer.out_proj.weight @ y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_equations(options: dict[str, Any]) -> None:
    mixer = mixer_of(**options)
    assert_equals_slow_form(mixer, partial(by_token, mixer), T, STARTS)


def test_without_options_it_is_the_operator() -> None:
    mixer = mixer_of(positions=T)
    x, starts, positions = draw(T, H * D, STARTS)
    y, state = mixer(x, positions, None)
    bias = mixer.bias[positions.positions]
    expected, after = tssa_reference(Inputs(mixer.in_proj(x), mixer.temp, bias, None, starts))
    torch.testing.assert_close(y, mixer.out_proj(expected), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(tuple(state[:3]), tuple(after))
    assert (state.remembered.numel(), state.tail.numel()) == (0, 0)


def test_the_way_around_the_operator_gives_the_same() -> None:
    """One tap of weight 1 changes nothing, and does not take the operator's way."""
    through, around = (
        mixer_of(forgetting="ladder", positions=T),
        mixer_of(forgetting="ladder", short_conv=1, positions=T),
    )
    missing = around.load_state_dict(through.state_dict(), strict=False)
    assert missing.missing_keys == ["conv.weight"]
    with torch.no_grad():
        around.conv.weight.fill_(1.0)
    x, _, positions = draw(T, H * D, STARTS)
    for found, expected in zip(around(x, positions, None)[1][:3], through(x, positions, None)[1][:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(around(x, positions, None)[0], through(x, positions, None)[0], rtol=1e-7, atol=1e-9)


def test_sums_over_a_long_context_lose_no_token() -> None:
    """In fp32 a running sum stalls where what it adds falls below its spacing."""
    config = ModelConfig(1, 2, 1, 40, positions=None, layers=(TSSAOptions(short_conv=1),))
    mixer = create_lm(config, 0).blocks[0].mixer
    assert isinstance(mixer, TSSA) and mixer.conv is not None
    with torch.no_grad():
        mixer.in_proj.weight.copy_(torch.eye(2))
        mixer.conv.weight.fill_(1.0)
    x = torch.full((1, 20_000, 2), 0.05)
    x[:, 0] = 300.0
    state: TSSAState | None = None
    for start in range(0, 20_000, 2000):
        positions = SequencePositions.build(torch.zeros(1, 2000, dtype=torch.long), start, None, None, False)
        with torch.no_grad():
            _, state = mixer(x[:, start : start + 2000], positions, state)
    exact = 90_000 + 19_999 * torch.tensor(0.05).double() ** 2
    torch.testing.assert_close(state.energy[0, 0], exact, rtol=2e-6, atol=0)  # fp32 would be 5e-4 off


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"short_conv": 9}, "short_conv 9 must be from 0 to 8 taps"),
        ({"membership": "scale_free"}, "membership: scale_free goes with forgetting: ladder or selective"),
        ({"halflife_tokens": (4.0, 64.0)}, "halflife_tokens goes with forgetting: ladder or selective"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TSSAOptions(**options)


def test_what_is_remembered() -> None:
    config = ModelConfig(1, H * D, H, 40, positions=None, layers=(TSSAOptions(**OPTIONS["everything"]),))
    lm = create_lm(config, 0)
    sizes = {lm(tokens_of(config, 1, length))[1].nbytes for length in (1, 2, 100, 700)}
    assert sizes == {8 * (2 * H * D + 2 * H) + 4 * 2 * H * D}


def test_half_lives_of_heads_are_geometric_and_a_single_head_has_the_longest() -> None:
    options = TSSAOptions(forgetting="ladder", halflife_tokens=(4.0, 64.0))
    for heads, expected in ((1, [64.0]), (2, [4.0, 64.0]), (3, [4.0, 16.0, 64.0])):
        rates = Forgetting(options, 24, heads).rates("cpu")
        torch.testing.assert_close(math.log(2) / rates, torch.tensor(expected, dtype=torch.float64))
