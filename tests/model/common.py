"""The models the tests of this folder run on, and tokens for them."""

import pytest
import torch

from tostlm.model import ModelConfig

SHAPES = {
    "tost": ModelConfig(2, 24, 3, 40, positions=64, layer_scale=0.5),
    "tost, forgetting, no positions": ModelConfig(
        2, 24, 3, 40, positions=None, halflife_tokens=(4, 64), layer_scale=0.5
    ),
    "gpt2": ModelConfig(2, 24, 3, 40, positions=64, mixers=("softmax",), layer_scale=0.5),
    "hybrid": ModelConfig(3, 24, 3, 40, positions=64, mixers=("tssa", "softmax"), layer_scale=0.5),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def tokens_of(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
