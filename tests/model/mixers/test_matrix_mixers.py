"""Mixers with a matrix of memory against their equations, token by token; what bf16 costs; what is remembered."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.common import double, tokens_of
from tests.model.mixers.common import assert_equals_slow_form
from tostlm.model import ModelConfig, create_lm
from tostlm.model.mixers.gated_delta import GatedDeltaOptions
from tostlm.model.mixers.tssa_cross import TSSACrossOptions
from tostlm.model.parts.keys_queries_values import MatrixMixerOptions

Update = Callable[[Tensor, float | Tensor, Tensor, Tensor, Tensor], Tensor]  # of S, a, b, k and v


def add(S: Tensor, a: float | Tensor, b: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return a * S + b * torch.outer(k, v)


def correct(S: Tensor, a: float | Tensor, b: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return a * S + b * torch.outer(k, v - a * S.T @ k)


MIXERS: dict[type[MatrixMixerOptions], Update] = {TSSACrossOptions: add, GatedDeltaOptions: correct}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ladder": {"forgetting": "ladder"},
    "never forgets": {"forgetting": "none", "gate": "none"},
    "two taps": {"short_conv": 2, "halflife_tokens": (1.0, 8.0)},
    "one tap": {"short_conv": 1},
    "no convolution": {"short_conv": 0},
}
mixers = pytest.mark.parametrize("kind", MIXERS, ids=lambda kind: kind.mixer)
T = 150  # two chunks and a ragged one
STARTS = ([5, 6, 80], [130])


def mixer_of(options: MatrixMixerOptions) -> Any:
    config = ModelConfig(1, 24, 3, 40, positions=None, layers=(options,))
    return double(config).blocks[0].mixer


def by_token(mixer: Any, update: Update, x: Tensor, starts: Tensor) -> Tensor:
    """The class's equations, a sequence, a token and a head at a time."""
    H, D = 3, 8
    options = mixer.options
    first, last = options.halflife_tokens or (4.0, 4096.0)
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        inputs: list[Tensor] = []  # of the document, before the convolution
        S = [x.new_zeros(D, D)] * H
        ys = []
        for token, begin in zip(sequence, begins, strict=True):
            if begin:
                inputs, S = [], [x.new_zeros(D, D)] * H
            inputs.append(mixer.memory.in_proj.weight @ token)
            kqv = inputs[-1]
            if mixer.memory.conv is not None:
                near = inputs[::-1][: options.short_conv]
                kqv = sum(mixer.memory.conv.weight[:, -1 - back] * near[back] for back in range(len(near)))
                kqv = kqv * torch.sigmoid(kqv)
            k, q, v = kqv.view(3, H, D)
            write = torch.sigmoid(mixer.memory.write_proj.weight @ token + mixer.memory.write_proj.bias)
            heads = []
            for h in range(H):
                if options.forgetting == "selective":
                    f = mixer.memory.forgetting
                    a = torch.exp(
                        -f.log_rate[h].exp() * torch.log1p(torch.exp(f.proj.weight[h] @ token + f.proj.bias[h]))
                    )
                else:
                    a = 1.0 if options.forgetting == "none" else 0.5 ** (1 / (first * (last / first) ** (h / (H - 1))))
                S[h] = update(S[h], a, write[h], k[h] / k[h].norm(), v[h])
                y = S[h].T @ q[h]
                heads.append(y / (y.square().mean() + 1e-6).sqrt())
            S = list(S)
            y = torch.cat(heads) * mixer.output.norm
            if mixer.output.gate_proj is not None:
                y = y * torch.sigmoid(mixer.output.gate_proj.weight @ token)
            ys.append(mixer.output.out_proj.weight @ y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@mixers
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_equations(kind: type[MatrixMixerOptions], options: dict[str, Any]) -> None:
    mixer = mixer_of(kind(**options))
    assert_equals_slow_form(mixer, partial(by_token, mixer, MIXERS[kind]), T, STARTS)


@mixers
def test_bf16_keeps_its_sums_in_fp32(kind: type[MatrixMixerOptions]) -> None:
    config = ModelConfig(2, 64, 4, 100, positions=None, layers=(kind(),), layer_scale=0.5)
    lm, tokens = create_lm(config, 0), tokens_of(config, 2, 300)
    exact, _ = lm(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = lm(tokens)
        pieces, before = [], None
        for piece in tokens.split([100, 1, 199], 1):
            logits, before = lm(piece, before)
            pieces.append(logits)
    assert {x.dtype for layer in state.layers for x in layer} == {torch.float32}
    assert (found - exact).norm() < 0.02 * exact.norm()
    torch.testing.assert_close(torch.cat(pieces, 1), found, rtol=0.02, atol=0.02)


@mixers
def test_what_is_remembered(kind: type[MatrixMixerOptions]) -> None:
    config = ModelConfig(1, 24, 3, 40, positions=None, layers=(kind(),))
    lm = create_lm(config, 0)
    sizes = {lm(tokens_of(config, 1, length))[1].nbytes for length in (1, 2, 100, 700)}
    assert sizes == {4 * (24 * 8 + 3 * 24 * 3)}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"short_conv": 9}, "short_conv 9 must be from 0 to 8 taps"),
        ({"short_conv": -1}, "short_conv -1 must be from 0 to 8 taps"),
        ({"halflife_tokens": (8.0, 4.0)}, r"halflife_tokens \[8.0, 4.0\] must be positive, shortest first"),
    ],
)
def test_options_out_of_range(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TSSACrossOptions(), **values)
