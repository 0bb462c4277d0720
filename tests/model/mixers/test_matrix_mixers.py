"""Mixers with a matrix of memory against their equations, token by token; what bf16 costs; what is remembered."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.model.common import double, tokens_of
from tests.model.mixers.common import assert_equals_slow_form, state_dtypes_under_bf16
from tostlm.model import ModelConfig, create_lm, state_bytes
from tostlm.model.config import MixerOptions
from tostlm.model.mixers.gated_delta import GatedDeltaOptions
from tostlm.model.mixers.gla import GLAOptions
from tostlm.model.mixers.mamba2 import Mamba2Options
from tostlm.model.mixers.rwkv7 import RWKV7Options
from tostlm.model.mixers.tssa_cross import TSSACrossOptions
from tostlm.model.mixers.tssa_delta import TSSADeltaOptions
from tostlm.model.parts.keys_queries_values import MatrixMixerOptions


class Write(NamedTuple):
    """A token in a head."""

    a: Tensor
    b: Tensor
    k: Tensor
    v: Tensor
    m: Tensor  # the running sum of b w^2
    center: float | Tensor


def add(S: Tensor, new: Write) -> Tensor:
    return new.a * S + new.b * torch.outer(new.k, new.v)


def correct(S: Tensor, new: Write) -> Tensor:
    return new.a * S + new.b * torch.outer(new.k, new.v - new.a * S.T @ new.k)


def correct_preconditioned(S: Tensor, new: Write) -> Tensor:
    z = torch.log(new.m / new.m.mean() + 1e-6) - new.center
    return new.a * S + new.b * torch.outer(new.k / 1.5 ** (z / (1 + z.abs())), new.v - new.a * S.T @ new.k)


UPDATES: dict[type[MatrixMixerOptions], Callable[[Tensor, Write], Tensor]] = {
    TSSACrossOptions: add,
    GatedDeltaOptions: correct,
    TSSADeltaOptions: correct_preconditioned,
}
MIXERS: dict[str, MatrixMixerOptions] = {
    "tssa_cross": TSSACrossOptions(),
    "tssa_cross, memberships": TSSACrossOptions(write="membership"),
    "gated_delta": GatedDeltaOptions(),
    "tssa_delta": TSSADeltaOptions(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ladder": {"forgetting": "ladder"},
    "never forgets": {"forgetting": "none", "gate": "none"},
    "two taps": {"short_conv": 2, "halflife_tokens": (1.0, 8.0)},
    "one tap": {"short_conv": 1},
    "no convolution": {"short_conv": 0},
}
EVERYTHING: dict[str, MixerOptions] = {
    **MIXERS,
    "mamba2": Mamba2Options(),
    "gla": GLAOptions(),
    "rwkv7": RWKV7Options(),
}
CROSS = 4 * (24 * 8 + 3 * 24 * 3)
REMEMBERED = {  # bytes a sequence, of C = 24 channels in heads of D = 8
    "tssa_cross": CROSS,
    "tssa_cross, memberships": CROSS + 8 * 2 * 3,
    "gated_delta": CROSS,
    "tssa_delta": CROSS + 8 * 24,
    "mamba2": 4 * (24 * 8 + 3 * (24 + 2 * 8)),
    "gla": 4 * 24 * 8,
    "rwkv7": 4 * (24 * 8 + 24),
}
mixers = pytest.mark.parametrize("name", MIXERS)
everything = pytest.mark.parametrize("name", EVERYTHING)
T = 150  # two chunks and a ragged one
STARTS = ([5, 6, 80], [130])
H, D = 3, 8


def mixer_of(options: MatrixMixerOptions) -> Any:
    config = ModelConfig(1, 24, 3, 40, positions=None, layers=(options,))
    return double(config).blocks[0].mixer


def keys_queries_values(mixer: Any, inputs: list[Tensor]) -> Tensor:
    """[3, H, D] of a document's last token, by the inputs of the convolution so far."""
    kqv = inputs[-1]
    if mixer.memory.conv is not None:
        near = inputs[::-1][: mixer.options.short_conv]
        kqv = sum((mixer.memory.conv.weight[:, -1 - back] * near[back] for back in range(len(near))), torch.zeros(()))
        kqv = kqv * torch.sigmoid(kqv)
    return kqv.view(3, H, D)


def decays(mixer: Any, token: Tensor) -> Tensor:
    first, last = mixer.options.halflife_tokens or (4.0, 4096.0)
    if mixer.options.forgetting == "selective":
        f = mixer.memory.forgetting
        return torch.exp(-f.log_rate.exp() * torch.log1p(torch.exp(f.proj.weight @ token + f.proj.bias)))
    if mixer.options.forgetting == "none":
        return token.new_ones(H)
    return token.new_tensor([0.5 ** (1 / (first * (last / first) ** (h / (H - 1)))) for h in range(H)])


def by_token(mixer: Any, x: Tensor, starts: Tensor) -> Tensor:
    """The class's equations, a sequence, a token and a head at a time."""
    update = UPDATES[type(mixer.options)]
    centers = getattr(mixer, "center", [0.0] * H)
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        ys: list[Tensor] = []
        for token, begin in zip(sequence, begins, strict=True):
            if begin or not ys:
                inputs: list[Tensor] = []  # of the document, before the convolution
                S, m = [x.new_zeros(D, D)] * H, x.new_zeros(H, D)
                s, N = x.new_zeros(H), x.new_zeros(H)
            inputs.append(mixer.memory.in_proj.weight @ token)
            w, q, v = keys_queries_values(mixer, inputs)
            a = decays(mixer, token)
            s, N = a * s + w.square().sum(-1), a * N + 1
            if getattr(mixer.options, "write", "sigmoid") == "membership":
                b = torch.softmax(mixer.temp * D**0.5 * (N * w.square().sum(-1) / s - 1), 0)
            else:
                b = torch.sigmoid(mixer.memory.write_proj.weight @ token + mixer.memory.write_proj.bias)
            m = a[:, None] * m + b[:, None] * w.square()
            heads = []
            S = list(S)
            for h in range(H):
                S[h] = update(S[h], Write(a[h], b[h], w[h] / w[h].norm(), v[h], m[h], centers[h]))
                y = S[h].T @ q[h]
                heads.append(y / (y.square().mean() + 1e-3).sqrt())
            y = torch.cat(heads) * mixer.output.norm
            if mixer.output.gate_proj is not None:
                y = y * torch.sigmoid(mixer.output.gate_proj.weight @ token)
            ys.append(mixer.output.out_proj.weight @ y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@mixers
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_equations(name: str, options: dict[str, Any]) -> None:
    mixer = mixer_of(replace(MIXERS[name], **options))
    assert_equals_slow_form(mixer, partial(by_token, mixer), T, STARTS)


@everything
def test_bf16_keeps_its_sums_in_fp32_or_wider(name: str) -> None:
    dtypes = state_dtypes_under_bf16(EVERYTHING[name], [100, 1, 199])
    assert dtypes in ({torch.float32}, {torch.float32, torch.float64})


@everything
def test_what_is_remembered(name: str) -> None:
    config = ModelConfig(1, 24, 3, 40, positions=None, layers=(EVERYTHING[name],))
    lm = create_lm(config, 0)
    sizes = {lm(tokens_of(config, 1, length))[1].nbytes for length in (1, 2, 100, 700)}
    assert sizes == {REMEMBERED[name]} == {state_bytes(config, 700)}


def test_memberships_take_the_place_of_learned_strengths() -> None:
    mixer = mixer_of(MIXERS["tssa_cross, memberships"])
    assert mixer.memory.write_proj is None
    assert mixer_of(MIXERS["tssa_cross"]).temp is None


@pytest.mark.parametrize("center", [-100.0, 0.0, 100.0])
def test_preconditioned_steps_are_stable_whatever_the_moments_are(center: float) -> None:
    """Of I - b P k k^T the one eigenvalue that is not 1 is above -0.5; nothing is lost in a zero or a large number."""
    mixer = mixer_of(TSSADeltaOptions())
    with torch.no_grad():
        mixer.center.fill_(center)
    lone = torch.zeros(D, dtype=torch.float64)
    lone[0] = 1e30
    moments = torch.stack([lone, lone * 1e-60, 0 * lone, lone + 1]).requires_grad_()  # [4, D]
    P = mixer._squash(moments[:, None].expand(4, H, D))
    assert (P > 1 / 1.5).all() and (P < 1.5).all()
    k = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(0)), dim=0).double()
    for row in P[:, 0]:
        values = torch.linalg.eigvals(torch.eye(D, dtype=torch.float64) - torch.outer(row * k, k)).real
        assert values.min() > -0.5 and values.max() < 1 + 1e-9
    (gradient,) = torch.autograd.grad(P.sum(), moments)
    assert gradient.isfinite().all()


def test_a_head_that_read_next_to_nothing_has_no_large_gradient() -> None:
    """The first token reads (q k) b v alone: where its query meets no key, the norm of that divides by almost 0."""
    mixer = mixer_of(TSSADeltaOptions())
    generator = torch.Generator().manual_seed(0)
    read, x = (torch.randn(1, 5, *shape, generator=generator).double() for shape in ((H, D), (H * D,)))
    read[0, 0] *= 1e-4
    read.requires_grad_()
    mixer.output(read, x).square().sum().backward()
    gradients = read.grad.norm(dim=(2, 3))[0]
    assert gradients[0] < 100 * gradients[1:].median()


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
