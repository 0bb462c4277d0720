"""What a block holds, traced on tensors without data, is what it holds with data."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tostlm.model import MIXERS, ModelConfig, create_lm
from tostlm.model.block import Bottom
from tostlm.model.positions import SequencePositions
from tostlm.plan.trace import LiveBytes, block_memory

B, T, C = 2, 256, 64
BF16 = torch.bfloat16


def shape(mixer: str) -> ModelConfig:
    return ModelConfig(2, C, 2, 128, None, (MIXERS[mixer].options_class(),))


def kept_bytes(config: ModelConfig, sequences: int, tokens: int, autocast: torch.dtype | None) -> int:
    """Bytes of what autograd saves for a block's backward pass, and of what the block returns."""
    block = create_lm(config, 0).blocks[0]
    x = torch.randn(sequences, tokens, C, requires_grad=True)
    given = {each.untyped_storage().data_ptr() for each in (x, *block.parameters())}
    saved: list[Tensor] = []

    def save(each: Tensor) -> Tensor:
        saved.append(each)
        return each

    with torch.autograd.graph.saved_tensors_hooks(save, lambda each: each):
        positions = SequencePositions.build(x[..., 0].long(), 0, None, None, block.mixer.needs_spans)
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            returned = block(x, positions, None, Bottom(None, None))
    storages = [each.untyped_storage() for each in (*saved, *tree_leaves(returned))]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in given}.values())


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_traced_block_keeps_what_autograd_saves(mixer: str) -> None:
    autocast = BF16 if mixer in ("tssa", "softmax", "tssa_delta") else None
    traced = block_memory(shape(mixer), 0, B, T, torch.float32, autocast)
    assert traced.kept == pytest.approx(kept_bytes(shape(mixer), B, T, autocast), rel=0.03)
    assert traced.kept <= traced.forward and traced.kept < traced.backward


def test_memory_is_a_line_in_sequences_and_goes_on_beyond_traced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = block_memory(shape("softmax"), 0, 3, 512, torch.float32, None)
    assert whole.kept == pytest.approx(kept_bytes(shape("softmax"), 3, 512, None), rel=0.01)
    monkeypatch.setattr("tostlm.plan.trace.TRACED_TOKENS", 128)
    assert block_memory(shape("softmax"), 0, 3, 512, torch.float32, None).kept == pytest.approx(whole.kept, rel=0.01)


def test_later_blocks_hold_what_is_skipped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(shape("softmax"), value_residual=True, embed_skip=True)
    first, later = (block_memory(config, layer, B, T, torch.float32, None) for layer in (0, 1))
    assert later.kept > first.kept


def test_live_bytes_are_those_of_tensors_that_something_holds() -> None:
    x = torch.zeros(1000)
    with LiveBytes([x]) as live:
        y = x + 1
        (y * 2).sum()
        assert live.bytes == 4000 and live.peak == 8004
        live.restart()
        y.add_(1).view(10, 100)
        assert live.peak == 4000
        del y
        assert live.bytes == 0
