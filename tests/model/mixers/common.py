"""What the tests of mixers share: tokens in documents, slow forms, and comparisons in values and gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.model.common import tokens_of
from tostlm.model import Mixer, MixerOptions, ModelConfig, create_lm
from tostlm.model.parts.attention import Attention
from tostlm.model.parts.short_conv import ShortConv
from tostlm.model.positions import SequencePositions


class Document(NamedTuple):
    """A document up to the token at hand."""

    tokens: list[Tensor]  # each [C]
    queries: list[Tensor]  # each [H, D], as keys and values
    keys: list[Tensor]
    values: list[Tensor]


def draw(tokens: int, width: int, starts: tuple[list[int], ...]) -> tuple[Tensor, Tensor, SequencePositions]:
    """x [B, T, C] in float64, where documents start [B, T], and the positions of both."""
    shape = len(starts), tokens
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, width, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, own in enumerate(starts):
        mask[row, own] = True
    return x, mask, SequencePositions.build(torch.zeros(shape, dtype=torch.long), 0, None, mask, True)


def assert_equals_slow_form(
    mixer: Mixer, slow: Callable[[Tensor, Tensor], Tensor], tokens: int, starts: tuple[list[int], ...]
) -> None:
    """Compare a mixer with `slow(x, starts)` in its results and the gradients of x and of all parameters."""
    x, mask, positions = draw(tokens, mixer.config.width, starts)
    y, _ = mixer(x, positions, None)
    expected = slow(x, mask)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x, *mixer.parameters()]
    gradients = (torch.autograd.grad(result, leaves, wanted) for result in (y, expected))
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)


def state_dtypes_under_bf16(options: MixerOptions, pieces: list[int]) -> set[torch.dtype]:
    """The dtypes of a mixer's state under bf16 autocast, whose logits are near fp32's, in pieces of a context too."""
    config = ModelConfig(2, 64, 4, 100, positions=None, layers=(options,), layer_scale=0.5)
    lm, tokens = create_lm(config, 0), tokens_of(config, 2, sum(pieces))
    exact, _ = lm(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = lm(tokens)
        parts, before = [], None
        for piece in tokens.split(pieces, 1):
            logits, before = lm(piece, before)
            parts.append(logits)
    assert (found - exact).norm() < 0.02 * exact.norm()
    torch.testing.assert_close(torch.cat(parts, 1), found, rtol=0.02, atol=0.02)
    return {x.dtype for layer in state.layers for x in layer if x.numel()}


def convolved(conv: ShortConv | None, inputs: list[Tensor]) -> Tensor:
    """The convolution of a document's tokens so far at the last of them; the token itself without one."""
    if conv is None:
        return inputs[-1]
    near = inputs[::-1][: conv.taps]
    total = torch.stack([conv.weight[:, -1 - back] * token for back, token in enumerate(near)]).sum(0)
    return total * torch.sigmoid(total) if conv.silu else total


def attention_by_token(mixer: Attention, read: Callable[[Document, int], Tensor], x: Tensor, starts: Tensor) -> Tensor:
    """Attention in which head h reads read(document, h) [D], a sequence, a token and a head at a time."""
    H, options = mixer.config.heads, mixer.options
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        inputs: list[Tensor] = []  # of the document, before the convolution
        document = Document([], [], [], [])
        ys = []
        for token, begin in zip(sequence, begins, strict=True):
            if begin:
                inputs, document = [], Document([], [], [], [])
            inputs.append(mixer.in_proj.weight @ token)
            q, k, v = convolved(mixer.conv, inputs).view(3, H, -1)
            if mixer.qk_scale is not None:
                q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
                q = q * mixer.qk_scale[:, None]
            if options.rotary_base is not None:
                position = len(document.keys)
                q, k = (torch.stack([turned(head, position, options.rotary_base) for head in z]) for z in (q, k))
            for own, new in zip(document, (token, q, k, v), strict=True):
                own.append(new)
            y = torch.cat([read(document, h) for h in range(H)])
            if mixer.gate_proj is not None:
                y = y * torch.sigmoid(mixer.gate_proj.weight @ token)
            ys.append(mixer.out_proj.weight @ y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """A head's channels as complex numbers, multiplied by e^(i angle)."""
    D = len(x)
    numbers = torch.complex(x[: D // 2], x[D // 2 :])
    angles = [position * base ** (-2 * i / D) for i in range(D // 2)]
    out = numbers * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
    return torch.cat([out.real, out.imag])


def softmax_read(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The values [D], weighted by the softmax of what a query [D] has in common with their keys."""
    scores = torch.stack([q @ key for key in keys]) / len(q) ** 0.5
    y: Tensor = sum(p * value for p, value in zip(scores.softmax(0), values, strict=True))
    return y
