"""The models the tests of this folder run on, and tokens for them."""

from typing import Any

import pytest
import torch

from tostlm.model import LM, MixerOptions, ModelConfig, create_lm
from tostlm.model.mixers.combiner import CombinerOptions
from tostlm.model.mixers.conv import ConvOptions
from tostlm.model.mixers.cross_covariance import CrossCovarianceOptions
from tostlm.model.mixers.fibottention import FibottentionOptions
from tostlm.model.mixers.gated_delta import GatedDeltaOptions
from tostlm.model.mixers.gla import GLAOptions
from tostlm.model.mixers.induction import InductionOptions
from tostlm.model.mixers.mamba2 import Mamba2Options
from tostlm.model.mixers.rwkv7 import RWKV7Options
from tostlm.model.mixers.segment import SegmentOptions
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.tssa import TSSAOptions
from tostlm.model.mixers.tssa_cross import TSSACrossOptions
from tostlm.model.mixers.tssa_delta import TSSADeltaOptions
from tostlm.model.mixers.window import WindowOptions

TSSA, SOFTMAX = (TSSAOptions(),), (SoftmaxOptions(),)  # layer plans


def _shape(layers: tuple[MixerOptions, ...], **keys: Any) -> ModelConfig:
    """Two blocks of three heads, without positions, unless `keys` say something else."""
    defaults = {"depth": 2, "width": 24, "heads": 3, "vocab_size": 40, "positions": None, "layer_scale": 0.5}
    return ModelConfig(layers=layers, **(defaults | keys))


SHAPES = {
    "tost": _shape(positions=64, layers=TSSA),
    "tost, forgetting, no positions": _shape(
        layers=(TSSAOptions(forgetting="ladder", halflife_tokens=(4.0, 64.0)),),
    ),
    "tost, selective": _shape(
        positions=64,
        layers=(
            TSSAOptions(forgetting="selective", halflife_tokens=(4.0, 64.0), short_conv=3, query="own", gate="output"),
            TSSAOptions(forgetting="ladder", membership="scale_free", short_conv=1),
        ),
    ),
    "gpt2": _shape(positions=64, layers=SOFTMAX),
    "cross": _shape(layers=(TSSACrossOptions(),)),
    "cross, plain": _shape(
        positions=64,
        layers=(TSSACrossOptions(forgetting="ladder", halflife_tokens=(4.0, 64.0), short_conv=0, gate="none"),),
    ),
    "cross, modern": _shape(
        layers=(TSSACrossOptions(),),
        layer_scale=None,
        norm="rmsnorm",
        embed_norm=True,
        mlp="swiglu",
        logit_softcap=5.0,
        value_residual=True,
        embed_skip=True,
    ),
    "cross, memberships": _shape(
        layers=(
            TSSACrossOptions(write="membership", halflife_tokens=(4.0, 64.0)),
            TSSACrossOptions(write="membership", forgetting="none", short_conv=0),
        ),
    ),
    "delta": _shape(layers=(GatedDeltaOptions(),)),
    "delta, preconditioned": _shape(layers=(TSSADeltaOptions(),)),
    "induction": _shape(
        layers=(
            InductionOptions(key_channels=24),
            InductionOptions(key_channels=10, halflife_tokens=20.0),
        )
    ),
    "mamba2": _shape(layers=(Mamba2Options(),)),
    "gla": _shape(
        layers=(GLAOptions(), GLAOptions(gate_rank=3, gate_temperature=1.0, short_conv=3)),
    ),
    "rwkv7": _shape(
        layers=(RWKV7Options(), RWKV7Options(decay_rank=2, rate_rank=3, gate_rank=4)),
        layer_scale=1.0,
    ),
    "window": _shape(
        layers=(WindowOptions(window_tokens=9, qk_norm=True, short_conv=3), TSSACrossOptions()),
        value_residual=True,
    ),
    "convolution, segments": _shape(
        layers=(ConvOptions(taps=3), SegmentOptions(segment_tokens=5, short_conv=2)),
    ),
    "combiner": _shape(
        positions=64,
        layers=(
            CombinerOptions(block_tokens=6, gate="output"),
            CombinerOptions(block_tokens=4, pooling="mean", rotary_base=100.0),
        ),
    ),
    "fibottention": _shape(
        layers=(FibottentionOptions(distance_tokens=(3, 20)),),
    ),
    "cross-covariance": _shape(
        positions=64,
        layers=(CrossCovarianceOptions(short_conv=2), CrossCovarianceOptions(forgetting="selective")),
    ),
    "softmax, modern": _shape(
        layers=(SoftmaxOptions(rotary_base=100.0, qk_norm=True, short_conv=3, gate="output"),),
    ),
    "biases": _shape(depth=3, positions=64, layers=(*TSSA, *SOFTMAX, SegmentOptions(segment_tokens=5)), bias=True),
    "hybrid": _shape(depth=3, positions=64, layers=SOFTMAX + TSSA, value_residual=True, embed_skip=True),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def tokens_of(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def double(config: ModelConfig) -> LM:
    """In float64, of weights large enough for everything to matter; the bias starts at zero, where it would not."""
    lm = create_lm(config, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in lm.requires_grad_(False).parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return lm.requires_grad_()
