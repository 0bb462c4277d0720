"""Against the equations, token by token; rotary positions are relative."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.common import double
from tests.model.mixers.common import Document, assert_equals_slow_form, attention_by_token, softmax_read
from tostlm.model import ModelConfig, create_lm
from tostlm.model.mixers.softmax import SoftmaxAttention, SoftmaxOptions
from tostlm.model.mixers.window import WindowOptions
from tostlm.model.parts import causal_attention
from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.rotary import rotate
from tostlm.model.positions import Spans

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


def starts_of(rows: list[list[int]]) -> Tensor:
    """Return the first token of each token's document [B, S], of the lengths of each row's documents."""
    return torch.stack([torch.cat([torch.full((n,), sum(row[:i])) for i, n in enumerate(row)]).long() for row in rows])


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    S, R = q.shape[2], k.shape[2]
    numbers = torch.arange(R)
    mask = (numbers <= numbers[R - S :, None]) & (numbers >= starts[:, None, -S:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def varlen_attn_by_its_documentation(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window_size: tuple[int, int]
) -> Tensor:
    """Sequences between cumulative bounds; the last query of each beside its last key."""
    assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.zeros_like(q)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        for i in range(q0, q1):
            seen = slice(k0, k1 - (q1 - 1 - i))
            weights = torch.einsum("hd,khd->hk", q[i] / q.shape[-1] ** 0.5, k[seen]).softmax(-1)
            out[i] = torch.einsum("hk,khd->hd", weights, v[seen])
    return out


@pytest.mark.parametrize("past", [0, 3, 20, 29])
@pytest.mark.parametrize("kernel", ["span by span", "varlen"])
def test_attention_by_spans_is_that_by_a_mask(past: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "ROWS", 4)
    if kernel == "varlen":
        monkeypatch.setattr(causal_attention, "_has_varlen", lambda q: True)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn_by_its_documentation)
    for rows in ([[30]], [[3, 17, 10], [30]], [[1] * 30, [20, 10], [29, 1]]):
        starts = starts_of(rows)
        B, S = len(rows), T - past
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, n, H, D, generator=generator).double().transpose(1, 2) for n in (S, T, T))
        spans = Spans.build(past, T, starts[:, past:])
        found = causal_attention.attend_causal(q, k, v, spans, None)
        torch.testing.assert_close(found, attend_by_mask(q, k, v, starts), rtol=1e-12, atol=1e-12)


def test_flash_attention_serves_packed_documents_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be seen without one: torch's operator takes tensors of this device, type and shape."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    calls = Calls([])
    mode = FakeTensorMode()

    def on_gpu(*shape: int, dtype: torch.dtype) -> Tensor:
        return FakeTensor(mode, torch.empty(*shape, dtype=dtype, device="meta"), torch.device("cuda"))

    for dtype in (torch.bfloat16, torch.float16):
        q = on_gpu(2, T, H, D, dtype=dtype).transpose(1, 2)
        bounds = on_gpu(5, dtype=torch.int32)
        with mode, calls:
            y = causal_attention.attend_causal(q, q, q, Spans(bounds, bounds), None)
        assert y.shape == q.shape and y.dtype == dtype
    assert sum("_varlen_attn" in name for name in calls.names) == 2


class Calls(TorchDispatchMode):
    """Records the operations that run, and the elements of the largest tensor that one returns."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.largest = names, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return result


def test_packed_documents_need_no_mask_of_tokens_by_tokens() -> None:
    lm = create_lm(ModelConfig(2, 16, 2, 40, None, (STRONGEST,)), 0)
    tokens = torch.arange(1024)[None] % 40
    starts = torch.zeros(1, 1024, dtype=torch.bool)
    starts[0, [100, 130, 700]] = True
    with Calls([]) as calls:
        loss, state = lm(tokens, targets=tokens, document_start_mask=starts)
        loss.backward()
        lm(tokens[:, :700], state.detach())
    assert calls.largest <= causal_attention.ROWS * 1024


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
