"""What the heads have read, on its way back into the residual stream."""

import pytest
import torch

from tests.model.common import SHAPES
from tostlm.model.parts.gated_output import GatedOutput


@pytest.mark.parametrize("length", [1e-2, 1e-4, 1e-8])
def test_a_head_that_reads_next_to_nothing_has_a_bounded_gradient(length: float) -> None:
    """Through the norm alone it is 1 / length: single heads of single tokens once outweighed a whole batch."""
    config = SHAPES["cross"]
    output, generator = GatedOutput(config, gated=True), torch.Generator().manual_seed(0)
    output.reset_parameters(generator)
    x = torch.randn(1, 1, config.width, generator=generator)
    y = torch.randn(1, 1, config.heads, config.width // config.heads, generator=generator)
    gradients = []
    for scale in (1.0, length):
        scaled = (scale * y).requires_grad_()
        output(scaled, x).sum().backward()
        gradients.append(scaled.grad.norm())
    assert gradients[1] < 64 * gradients[0]
