"""Against the equations, token by token; rotary positions are relative."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.model.common import double
from tests.model.mixers.common import Document, assert_equals_slow_form, attention_by_token, softmax_read
from tostlm.model import ModelConfig
from tostlm.model.mixers.softmax import SoftmaxAttention, SoftmaxOptions
from tostlm.model.mixers.window import WindowOptions
from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.rotary import rotate

STRONGEST = SoftmaxOptions(rotary_base=100.0, qk_norm=True, short_conv=4, gate="output")
OPTIONS: dict[str, AttentionOptions] = {
    "plain": SoftmaxOptions(),
    "rotary": SoftmaxOptions(rotary_base=100.0),
    "normalized": SoftmaxOptions(qk_norm=True),
    "convolved": SoftmaxOptions(short_conv=2),
    "gated": SoftmaxOptions(gate="output"),
    "strongest": STRONGEST,
    "window": WindowOptions(window_tokens=5),
    "window of the strongest": WindowOptions(
        window_tokens=7, rotary_base=100.0, qk_norm=True, short_conv=4, gate="output"
    ),
    "window beyond the context": WindowOptions(window_tokens=50),
}
H, D, T = 3, 8, 30


def mixer_of(options: AttentionOptions) -> Attention:
    mixer = double(ModelConfig(1, H * D, H, 40, positions=None, layers=(options,))).blocks[0].mixer
    assert isinstance(mixer, Attention)
    return mixer


def read_near(options: AttentionOptions, document: Document, h: int) -> Tensor:
    near = slice(-getattr(options, "window_tokens", T), None)
    keys, values = ([z[h] for z in part[near]] for part in (document.keys, document.values))
    return softmax_read(document.queries[-1][h], keys, values)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_equations(options: AttentionOptions) -> None:
    mixer = mixer_of(options)
    slow = partial(attention_by_token, mixer, partial(read_near, options))
    assert_equals_slow_form(mixer, slow, T, ([5, 6, 20], [17]))


def test_rotary_positions_are_relative_however_far() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 5, 8, generator=generator) for _ in range(2))
    near = torch.arange(5)
    products = [
        (rotate(q, near + far, 10_000.0) * rotate(k, near + far - 3, 10_000.0)).sum(-1) for far in (3, 1000, 10_000_000)
    ]
    for found in products[1:]:
        torch.testing.assert_close(found, products[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "width", "said"),
    [
        ({"rotary_base": 1.0}, 24, "rotary_base 1.0 must be above 1"),
        ({"window_tokens": 1}, 24, "window_tokens 1 must be 2 or more"),
        ({"short_conv": 9}, 24, "short_conv 9 must be from 0 to 8 taps"),
        ({"rotary_base": 100.0}, 9, "heads of 3 channels cannot have rotary positions; their number must be even"),
    ],
)
def test_impossible_options(options: dict[str, float], width: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind = WindowOptions if "window_tokens" in options else SoftmaxOptions
        config = ModelConfig(1, width, 3, 40, None, (kind(**options),))
        mixer_of(config.layers[0]) if width == 24 else SoftmaxAttention(config, config.layers[0])
