"""whole == ranks: contexts split over 1, 2 and 4 gloo processes, in losses, end states and every gradient."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.common import SHAPES, double, tokens_of
from tests.processes import Sent, on_ranks
from tostlm.model import LMState, create_lm

CONFIGS = {name: replace(config, heads=4) for name, config in SHAPES.items()}  # heads that split over 4 ranks
CASES = [(name, with_documents) for name in CONFIGS for with_documents in (False, True)]
CUTS = (0, 16, 56)  # two calls, the second with the state of the first
SEQUENCES = 2
DIVISOR = "softmax layers need as many or a divisor"


def inputs_of(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document starts of a context; some documents are longer than a rank's tokens."""
    config = CONFIGS[name]
    tokens, targets = (tokens_of(config, SEQUENCES, CUTS[-1], seed=seed) for seed in (0, 1))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, [0, 20, 21]] = mask[1, [7, 39]] = True
    return tokens, targets, mask


def outcome(name: str, with_documents: bool, rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Two calls on a rank's pieces of a context: the losses, their gradients and the state in the end."""
    world_size = 1 if group is None else group.size()
    lm, (tokens, targets, mask) = double(CONFIGS[name]), inputs_of(name)
    state: LMState | None = None
    losses = []
    for start, stop in pairwise(CUTS):
        own = slice(start + (stop - start) * rank // world_size, start + (stop - start) * (rank + 1) // world_size)
        loss, state = lm(tokens[:, own], state, targets[:, own], mask[:, own] if with_documents else None, group)
        losses.append(loss)
    assert state is not None
    gradients = torch.autograd.grad(sum(losses), list(lm.parameters()))
    return {
        "losses": torch.stack(losses).detach(),
        "gradients": [gradient.contiguous() for gradient in gradients],
        "tokens": state.tokens,
        "document": state.document_start,
        "layers": [[x.detach() for x in layer] for layer in state.layers],
    }


def bytes_sent(context: int, rank: int, world_size: int, sent: Sent) -> tuple[int, int]:
    """Of ToST with document starts, forward and backward."""
    config = replace(CONFIGS["tost"], positions=context)
    lm, piece = create_lm(config, 0), tokens_of(config, SEQUENCES, context // world_size, seed=rank)
    sent.bytes = 0
    loss, _ = lm(piece, targets=piece, document_start_mask=piece == 0, group=dist.group.WORLD)
    forward = sent.bytes
    loss.backward()
    return forward, sent.bytes - forward


def refusal(name: str, reset_at: int, rank: int, world_size: int) -> str:
    """What a rank says of a context of 80 tokens, whose documents are of `reset_at` and the rest."""
    config = SHAPES[name]
    lm = create_lm(config, 0)
    mask = torch.zeros(1, 80, dtype=torch.bool)
    mask[0, reset_at] = True
    own = slice(80 * rank // world_size, 80 * (rank + 1) // world_size)
    try:
        lm(tokens_of(config, 1, 80)[:, own], document_start_mask=mask[:, own], group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    found = {"outcomes": [outcome(name, with_documents, rank, group) for name, with_documents in CASES]}
    found["refusals"] = [refusal("tost", reset_at, rank, world_size) for reset_at in (40, 70, 10)]
    found["heads"] = refusal("gpt2", 40, rank, world_size)
    sent = Sent()
    return {**found, "bytes": [bytes_sent(context, rank, world_size, sent) for context in (32, 1024)]}


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_the_whole(world_size: int, tmp_path: Path) -> None:
    found = on_ranks(world_size, on_rank, tmp_path)
    for index, (name, with_documents) in enumerate(CASES):
        expected = outcome(name, with_documents, 0, None)
        ranks = [results["outcomes"][index] for results in found]
        same(torch.stack([own["losses"] for own in ranks]).mean(0), expected["losses"])
        for gradient, *own in zip(expected["gradients"], *(own["gradients"] for own in ranks), strict=True):
            same(torch.stack(own).mean(0), gradient)  # as DeepSpeed averages them
        for rank, own in enumerate(ranks):
            assert own["tokens"] == expected["tokens"]
            same(own["document"], expected["document"])
            for layer, (theirs, whole) in enumerate(zip(own["layers"], expected["layers"], strict=True)):
                split = (0, 1) if CONFIGS[name].layer_plan[layer].mixer == "softmax" else ()  # keys and values
                same(theirs, [x.chunk(world_size, dim=1)[rank] if n in split else x for n, x in enumerate(whole)])

    layers, C, H = CONFIGS["tost"].depth, CONFIGS["tost"].width, CONFIGS["tost"].heads
    forward = 8 * SEQUENCES * layers * (C + H + C + 2 * H)
    backward = 8 * SEQUENCES * layers * (world_size * (C + H) + 2 * C + 3 * H)
    for results in found:
        too_long = "a document of 70 tokens is longer than the model's 64 positions"
        assert results["refusals"] == ["", too_long, too_long]
        assert results["heads"] == (
            "" if world_size == 1 else f"3 heads do not split over {world_size} ranks; {DIVISOR}"
        )
        # A number per sequence for the documents; the energy's gradient goes back to every rank.
        assert results["bytes"] == [(forward + 8 * SEQUENCES, backward)] * 2


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
