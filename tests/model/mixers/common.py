"""What the tests of mixers share: tokens in documents, and a comparison with a slow form in values and gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from tostlm.model import Mixer
from tostlm.model.parts.short_conv import ShortConv
from tostlm.model.positions import SequencePositions


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


def convolved(conv: ShortConv | None, inputs: list[Tensor]) -> Tensor:
    """The convolution of a document's tokens so far at the last of them, with SiLU; the token itself without one."""
    if conv is None:
        return inputs[-1]
    near = inputs[::-1][: conv.taps]
    total = torch.stack([conv.weight[:, -1 - back] * token for back, token in enumerate(near)]).sum(0)
    return total * torch.sigmoid(total)
