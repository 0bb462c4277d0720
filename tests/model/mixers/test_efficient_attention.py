"""Mixers that read a few tokens, summaries or channels, against their equations; what they remember; bf16."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.common import double, tokens_of
from tests.model.mixers.common import (
    Document,
    assert_equals_slow_form,
    attention_by_token,
    draw,
    softmax_read,
    state_dtypes_under_bf16,
)
from tostlm.model import MixerOptions, ModelConfig, create_lm, state_bytes
from tostlm.model.mixers.combiner import CombinerOptions
from tostlm.model.mixers.cross_covariance import CrossCovariance, CrossCovarianceOptions
from tostlm.model.mixers.fibottention import FibottentionOptions, head_distances
from tostlm.model.mixers.segment import SegmentOptions
from tostlm.model.parts.attention import Attention

H, D, C = 3, 8, 24
ALL: dict[str, Any] = {"qk_norm": True, "short_conv": 3, "gate": "output"}

Read = Callable[[Document, int], Tensor]


def segment(mixer: Attention, document: Document, h: int) -> Tensor:
    S = mixer.options.segment_tokens
    own = (len(document.keys) - 1) // S
    reads = [s for s in range(len(document.keys)) if s // S in (own - 1, own)]
    return read_of(document, h, reads)


def fibottention(mixer: Attention, document: Document, h: int) -> Tensor:
    """Rows of Wythoff's array by its defining property: each starts with the smallest number in no row before it."""
    options = mixer.options
    assert isinstance(options, FibottentionOptions)
    taken: set[int] = set()
    for _ in range(h + 1):
        first = next(n for n in range(1, 10_000) if n not in taken)
        own = [first, int(first * (1 + 5**0.5) / 2) + 1]
        while own[-1] < 1000:
            own.append(own[-2] + own[-1])
        taken.update(own)
    if options.sequences == "modified":
        own = [own[0] - (own[1] - own[0]), own[1] - own[0], *own]
    low, high = options.distance_tokens
    limit = low + (high - low) * h // (H - 1)
    t = len(document.keys) - 1
    reads = [t - distance for distance in {0, *own} if distance <= min(limit, t)]
    return read_of(document, h, reads)


def combiner(mixer: Attention, document: Document, h: int) -> Tensor:
    options = mixer.options
    assert isinstance(options, CombinerOptions)
    queries, keys, values = ([z[h] for z in part] for part in document[1:])
    S, t = options.block_tokens, len(keys) - 1
    pool = (lambda z: torch.stack(z).amax(0)) if options.pooling == "max" else (lambda z: sum(z) / len(z))
    read_keys, read_values = [], []
    for block in range(t // S):
        own = slice(block * S, (block + 1) * S)
        read_keys.append(pool(keys[own]))
        read_values.append(softmax_read(pool(queries[own]), keys[own], values[own]))
    near = slice(t - t % S, None)
    return softmax_read(queries[-1], read_keys + keys[near], read_values + values[near])


def cross_covariance(mixer: Attention, document: Document, h: int) -> Tensor:
    assert isinstance(mixer, CrossCovariance)
    weights = [torch.ones((), dtype=torch.float64)]  # of each token in the sums, the last first
    f = mixer.forgetting
    for token in document.tokens[:0:-1]:
        decay = torch.ones((), dtype=torch.float64)
        if f.kind == "selective":
            decay = torch.exp(-f.log_rate[h].exp() * torch.log1p(torch.exp(f.proj.weight[h] @ token + f.proj.bias[h])))
        elif f.kind == "ladder":
            decay = decay * 0.5 ** (1 / (4 * 1024 ** (h / (H - 1))))
        weights.append(weights[-1] * decay)
    w = torch.stack(weights[::-1])[:, None]
    q, k = (torch.stack([z[h] for z in part]) for part in (document.queries, document.keys))  # [t + 1, D]
    lengths = [(w * z.square()).sum(0).sqrt() for z in (k, q)]
    cosines = (w * k).T @ q / torch.outer(*lengths)
    return (mixer.temp[h] * cosines).softmax(0).T @ document.values[-1][h]


def read_of(document: Document, h: int, reads: list[int]) -> Tensor:
    keys, values = ([part[s][h] for s in reads] for part in (document.keys, document.values))
    return softmax_read(document.queries[-1][h], keys, values)


FORMS: dict[str, tuple[MixerOptions, Callable[[Attention, Document, int], Tensor]]] = {
    "segment": (SegmentOptions(segment_tokens=5), segment),
    "segment of all": (SegmentOptions(segment_tokens=4, **ALL), segment),
    "segment of one token": (SegmentOptions(segment_tokens=1), segment),
    "segment beyond the context": (SegmentOptions(segment_tokens=50), segment),
    "fibottention": (FibottentionOptions(distance_tokens=(3, 20)), fibottention),
    "fibottention of all": (FibottentionOptions(distance_tokens=(10, 10), **ALL), fibottention),
    "fibottention, modified": (FibottentionOptions(sequences="modified", rotary_base=None), fibottention),
    "combiner": (CombinerOptions(block_tokens=5), combiner),
    "combiner of all": (CombinerOptions(block_tokens=4, **ALL), combiner),
    "combiner of means": (CombinerOptions(block_tokens=3, pooling="mean", rotary_base=100.0), combiner),
    "combiner beyond the context": (CombinerOptions(), combiner),
    "cross-covariance": (CrossCovarianceOptions(), cross_covariance),
    "cross-covariance, ladder": (CrossCovarianceOptions(forgetting="ladder", short_conv=3), cross_covariance),
    "cross-covariance, selective": (CrossCovarianceOptions(forgetting="selective", gate="output"), cross_covariance),
}
LONG = {"cross-covariance", "cross-covariance, selective"}  # read in chunks


def config_of(options: MixerOptions, heads: int = H) -> ModelConfig:
    return ModelConfig(1, C, heads, 40, positions=None, layers=(options,))


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_equations(name: str) -> None:
    options, read = FORMS[name]
    mixer = double(config_of(options)).blocks[0].mixer
    assert isinstance(mixer, Attention)
    slow = partial(attention_by_token, mixer, partial(read, mixer))
    tokens, starts = (70, ([5, 6, 40], [66])) if name in LONG else (31, ([5, 6, 20], [17]))
    assert_equals_slow_form(mixer, slow, tokens, starts)


def test_no_distance_is_read_by_two_heads() -> None:
    found = head_distances(12, FibottentionOptions())
    assert found[0] == [0, 1, 2, 3, 5]
    assert found[1][:4] == [0, 4, 7, 11]
    assert found[11] == [0, 30, 49, 79, 128, 207]
    distances = [distance for own in found for distance in own[1:]]
    assert len(distances) == len(set(distances))
    assert head_distances(3, FibottentionOptions(sequences="modified"))[2][:5] == [0, 2, 4, 6, 10]


@pytest.mark.parametrize("name", FORMS)
def test_what_is_remembered(name: str) -> None:
    """As `state_bytes` says; in Combiner two vectors more for every block that has begun."""
    config = config_of(FORMS[name][0])
    lm = create_lm(config, 0)
    lengths = (1, 2, 100, 300)
    sizes = [lm(tokens_of(config, 1, length))[1].nbytes for length in lengths]
    assert sizes == [state_bytes(config, length) for length in lengths]
    assert (len(set(sizes)) == 1) == lm.blocks[0].mixer.constant_state


@pytest.mark.parametrize("name", FORMS)
def test_bf16_keeps_its_sums_in_fp32(name: str) -> None:
    assert state_dtypes_under_bf16(FORMS[name][0], [50, 1, 99]) <= {torch.float32, torch.float64}


def test_what_is_stacked_or_mapped_is_not_kept_for_the_backward_pass() -> None:
    """1,000 tokens x 64 channels x 64 would be 4,096,000 numbers; x 15 distances, of keys and values, 1,920,000."""
    for options in (CrossCovarianceOptions(), FibottentionOptions(distance_tokens=(1000, 1000))):
        mixer = create_lm(ModelConfig(1, 64, 1, 40, positions=None, layers=(options,)), 0).blocks[0].mixer
        kept: dict[int, int] = {}

        def count(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.numel()
            return x

        x, _, positions = draw(1000, 64, ([0],))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            mixer(x.float(), positions, None)
        assert sum(kept.values()) < 1_000_000


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (SegmentOptions, {"segment_tokens": 0}, "segment_tokens 0 must be 1 or more"),
        (CombinerOptions, {"block_tokens": 1}, "block_tokens 1 must be 2 or more"),
        (CombinerOptions, {"rotary_base": 100.0}, "rotary_base 100.0 does not go with pooling: max.*use pooling: mean"),
        (FibottentionOptions, {"distance_tokens": (0, 9)}, r"distance_tokens \[0, 9\] must be 1 or more"),
        (FibottentionOptions, {"distance_tokens": (9, 5)}, r"distance_tokens \[9, 5\] must be .* shortest first"),
        (FibottentionOptions, {"distance_tokens": (1, 5)}, r"\[1, 5\] leave head 2 of 3 nothing .* make them larger"),
        (CrossCovarianceOptions, {"qk_norm": True}, "rotary_base and qk_norm do not go with cross_covariance"),
        (CrossCovarianceOptions, {"halflife_tokens": (1.0, 2.0)}, "halflife_tokens goes with forgetting"),
        (CrossCovarianceOptions, {"short_conv": 9}, "short_conv 9 must be from 0 to 8 taps"),
    ],
)
def test_impossible_options(kind: type[MixerOptions], values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_lm(config_of(kind(**values)), 0)
