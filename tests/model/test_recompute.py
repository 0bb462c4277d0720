"""Blocks computed again in the backward pass: the same numbers, and less is kept."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.common import SOFTMAX, TSSA, double, shapes, tokens_of
from tests.processes import on_ranks
from tostlm.model import LM, ModelConfig, create_lm


def outcome(lm: LM, rank: int = 0, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Loss, gradients and end state of two calls, the second with the state of the first."""
    tokens, targets = (tokens_of(lm.config, 2, 40, seed=seed).chunk(2, dim=1) for seed in (0, 1))
    state, losses = None, []
    for x, y in zip(tokens, targets, strict=True):
        own = [part.chunk(group.size(), dim=1)[rank] if group else part for part in (x, y, x == 0)]
        loss, state = lm(own[0], state, own[1], own[2], group)
        losses.append(loss)
    assert state is not None
    gradients = torch.autograd.grad(sum(losses), list(lm.parameters()))
    return [torch.stack(losses).detach(), *gradients, *(x.detach() for layer in state.layers for x in layer)]


@shapes
@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_changes_nothing(config: ModelConfig, every: int) -> None:
    lm = double(config)
    expected = outcome(lm)
    lm.activation_checkpointing_every = every
    for found, wanted in zip(outcome(lm), expected, strict=True):
        assert torch.equal(found, wanted)


def bytes_kept(lm: LM) -> int:
    """What a forward pass keeps for the backward pass, beside the parameters."""
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = tokens_of(lm.config, 4, 64)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss, _ = lm(tokens, targets=tokens)
    for parameter in lm.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    return sum(kept.values())


def test_recomputation_keeps_a_blocks_input_alone() -> None:
    lm = create_lm(ModelConfig(8, 32, 2, 40, positions=None, layers=TSSA), 0)
    kept = {}
    for every in (None, 2, 1):
        lm.activation_checkpointing_every = every
        kept[every] = bytes_kept(lm)
    a_block = (kept[None] - kept[1]) / 8
    assert a_block > 8 * 4 * 64 * 32 * 4  # at least eight residual streams
    assert kept[None] - kept[2] == pytest.approx(4 * a_block, rel=0.01)
    assert kept[1] < 0.2 * kept[None]


def recomputed_on_rank(rank: int, world_size: int) -> list[list[Tensor]]:
    lm = double(ModelConfig(3, 24, 2, 40, positions=64, layers=TSSA + SOFTMAX, layer_scale=0.5))
    found = []
    for every in (None, 1):
        lm.activation_checkpointing_every = every
        found.append([x.contiguous() for x in outcome(lm, rank, dist.group.WORLD)])
    return found


def test_recomputation_over_ranks(tmp_path: Path) -> None:
    for kept, recomputed in on_ranks(2, recomputed_on_rank, tmp_path):
        for found, wanted in zip(recomputed, kept, strict=True):
            assert torch.equal(found, wanted)
