"""A causal depthwise convolution over the last few tokens, as mixers put before their keys, queries and values.

Shapes: B sequences, T tokens, K channels, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tostlm.autograd import first_order
from tostlm.model.parts.neighbours import neighbours
from tostlm.model.positions import SequencePositions

MAX_TAPS = 8
CACHED = 1 << 18  # numbers of a tensor that a CPU's caches hold beside a few more


def check_taps(taps: int) -> None:
    """Raise ValueError unless the option `short_conv` is a number of taps, or 0 for no convolution."""
    if not 0 <= taps <= MAX_TAPS:
        raise ValueError(f"short_conv {taps} must be from 0 to {MAX_TAPS} taps")


class ShortConv(nn.Module):
    """y_t = activation(sum over j < W of weight[:, -1 - j] x_{t-j}), within a token's document.

    It starts near the identity: the last tap 1, and a little noise on all.

    Source: the short convolutions of Mamba (arXiv 2312.00752) and of Gated DeltaNet (arXiv 2412.06464).
    """

    NOISE = 0.1  # standard deviation of the taps at initialization

    def __init__(self, channels: int, taps: int, silu: bool) -> None:
        """`taps` W >= 1 of each of `channels` K; `silu` is whether SiLU follows."""
        super().__init__()
        self.taps, self.silu = taps, silu
        self.weight = nn.Parameter(torch.empty(channels, taps))

    def forward(self, x: Tensor, tail: Tensor | None, positions: SequencePositions) -> tuple[Tensor, Tensor]:
        """Convolve x [B, T, K], whose context has `tail` [B, W - 1, K] before it; None where it has nothing.

        Returns:
            [B, T, K] in x's dtype, and the tail of all tokens so far, of every rank that shares the context: in fp32 or
            wider, which holds narrower numbers exactly.
        """
        before, after = neighbours(x, tail, self.taps - 1, positions)
        padded = torch.cat([before.to(x.dtype), x], 1)  # [B, W - 1 + T, K]
        place = None if positions.document_start is None else positions.positions[..., None]
        y: Tensor = _Convolve.apply(padded, self.weight.to(x.dtype).t(), place, self.silu)  # type: ignore[no-untyped-call]
        return y, after

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the taps in place."""
        self.weight.normal_(0, self.NOISE, generator=generator)
        self.weight[:, -1] += 1


def convolved(
    conv: ShortConv | None, x: Tensor, tail: Tensor | None, positions: SequencePositions
) -> tuple[Tensor, Tensor]:
    """Return `conv(x, tail, positions)`; without a convolution x itself and an empty tail [B, 0, K]."""
    if conv is not None:
        y: Tensor
        y, tail = conv(x, tail, positions)
        return y, tail
    return x, x.new_zeros(x.shape[0], 0, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))


def tail_bytes(conv: ShortConv | None) -> int:
    """Return the bytes of one sequence's tail."""
    return 0 if conv is None else 4 * conv.weight.shape[0] * (conv.taps - 1)


class _Convolve(torch.autograd.Function):
    """The sum over taps of padded [B, W - 1 + T, K] times weight [W, K], and SiLU of it where `silu` says so.

    It keeps its inputs alone, and is half the passes over memory that autograd would take. `place` [T, 1] or [B, T, 1]
    is each token's place in its document, which nothing before it reaches into; None where there is nothing to keep
    apart.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, place: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(padded, weight, place)
        ctx.silu = silu
        (B, P, K), W = padded.shape, len(weight)
        y = padded.new_empty(B, P - W + 1, K)
        for tokens in _blocks(padded, W):
            part = _sum_of_taps(padded, weight, place, tokens)
            y[:, tokens] = F.silu(part, inplace=True) if silu else part
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        padded, weight, place = ctx.saved_tensors
        dpadded, dweight, W = torch.zeros_like(padded), torch.zeros_like(weight), len(weight)
        for tokens in _blocks(padded, W):
            d = dy[:, tokens]
            if ctx.silu:
                d = torch.ops.aten.silu_backward(d, _sum_of_taps(padded, weight, place, tokens))
            for back in range(W):
                near = _before(tokens, back, W)
                reaching = d if place is None or back == 0 else d * (place[..., tokens, :] >= back)
                dpadded[:, near].addcmul_(reaching, weight[-1 - back])
                dweight[-1 - back] += (reaching * padded[:, near]).sum((0, 1))
        return dpadded, dweight, None, None


def _sum_of_taps(padded: Tensor, weight: Tensor, place: Tensor | None, tokens: slice) -> Tensor:
    W = len(weight)
    y = padded[:, _before(tokens, 0, W)] * weight[-1]
    for back in range(1, W):
        near = padded[:, _before(tokens, back, W)]
        y.addcmul_(near if place is None else near * (place[..., tokens, :] >= back), weight[-1 - back])
    return y


def _before(tokens: slice, back: int, W: int) -> slice:
    """Where in padded [B, W - 1 + T, K] the tokens are that are `back` places before `tokens` of T."""
    shift = W - 1 - back
    return slice(tokens.start + shift, tokens.stop + shift)


def _blocks(padded: Tensor, W: int) -> list[slice]:
    """Return the T tokens in blocks that a CPU's caches hold; compiled, and elsewhere, in one."""
    B, P, K = padded.shape
    T = P - W + 1
    cached = padded.device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, CACHED // max(1, B * K)) if cached else max(1, T)
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]
