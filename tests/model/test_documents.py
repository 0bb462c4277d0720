"""Documents packed in one context: each is read as if it stood alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.common import SHAPES, double, shapes, tokens_of
from tostlm.model import LM, ModelConfig, create_lm

LENGTHS = [[50, 1, 2, 37], [7, 64, 19], [33, 57]]  # of each row's documents; they cross the operator's chunks of 32
CONTEXT = 90


def document_starts(lengths: list[list[int]]) -> Tensor:
    """True at the first token of each document, [rows, CONTEXT]."""
    mask = torch.zeros(len(lengths), CONTEXT, dtype=torch.bool)
    for row, own in enumerate(lengths):
        mask[row, [0, *itertools.accumulate(own[:-1])]] = True
    return mask


def loss_and_gradients(lm: LM, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(lm.parameters()))]


def in_pieces(lm: LM, tokens: Tensor, mask: Tensor, cuts: list[int]) -> tuple[Tensor, object]:
    state, pieces = None, []
    for start, stop in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        own = mask[:, start:stop]
        # A call without a mask may leave the argument out: the state knows of the earlier ones.
        logits, state = lm(tokens[:, start:stop], state, document_start_mask=own if own.any() else None)
        pieces.append(logits)
    return torch.cat(pieces, 1), state


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@shapes
@pytest.mark.parametrize("marked", [True, False], ids=["begins with a mask", "begins without"])
def test_packed_documents_cost_and_teach_what_they_do_alone(config: ModelConfig, marked: bool) -> None:
    lm, tokens, targets = double(config), tokens_of(config, 3, CONTEXT), tokens_of(config, 3, CONTEXT, seed=1)
    mask = document_starts(LENGTHS)
    mask[:, 0] = marked
    alone = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        for x, y in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True):
            alone = alone + lm(x[None], targets=y[None])[0] * len(x) / tokens.numel()
    expected = loss_and_gradients(lm, alone)
    packed, _ = lm(tokens, targets=targets, document_start_mask=mask)
    for found, wanted in zip(loss_and_gradients(lm, packed), expected, strict=True):
        assert_same(found, wanted)


@shapes
def test_without_resets_documents_read_one_another(config: ModelConfig) -> None:
    """The control: were resets ignored, the test above would fail."""
    lm, tokens = double(config), tokens_of(config, 3, 60)
    packed, _ = lm(tokens, targets=tokens, document_start_mask=document_starts(LENGTHS)[:, :60])
    joined, _ = lm(tokens, targets=tokens)
    assert abs(packed - joined) > 1e-3


@shapes
def test_resets_nowhere_or_at_the_first_token_change_nothing(config: ModelConfig) -> None:
    lm, tokens = double(config), tokens_of(config, 3, 50)
    plain, _ = lm(tokens)
    mask = torch.zeros(3, 50, dtype=torch.bool)
    assert_same(lm(tokens, document_start_mask=mask)[0], plain)
    mask[:, 0] = True
    assert_same(lm(tokens, document_start_mask=mask)[0], plain)


@shapes
@settings(max_examples=12)
@given(
    cuts=st.sets(st.integers(1, CONTEXT - 1), max_size=5),
    resets=st.lists(st.sets(st.integers(0, CONTEXT - 1), max_size=5), min_size=2, max_size=2),
    at_cuts=st.booleans(),
)
def test_pieces_equal_the_whole(config: ModelConfig, cuts: set[int], resets: list[set[int]], at_cuts: bool) -> None:
    lm, tokens = double(config), tokens_of(config, 2, CONTEXT)
    mask = torch.zeros(2, CONTEXT, dtype=torch.bool)
    for row, own in enumerate(resets):
        mask[row, [45, *own]] = True  # no document is longer than the positions
    if at_cuts:
        mask[0, sorted(cuts)] = True
    whole, end = lm(tokens, document_start_mask=mask)
    pieces, state = in_pieces(lm, tokens, mask, sorted(cuts))
    assert_same(pieces, whole)
    assert_same(state, end)


@shapes
def test_single_steps_equal_the_whole(config: ModelConfig) -> None:
    lm, tokens, mask = double(config), tokens_of(config, 3, CONTEXT), document_starts(LENGTHS)
    whole, end = lm(tokens, document_start_mask=mask)
    steps, state = in_pieces(lm, tokens, mask, list(range(1, CONTEXT)))
    assert_same(steps, whole)
    assert_same(state, end)


@shapes
def test_states_of_chosen_sequences_know_their_documents(config: ModelConfig) -> None:
    lm, tokens, mask = double(config), tokens_of(config, 3, CONTEXT), document_starts(LENGTHS)
    whole, _ = lm(tokens, document_start_mask=mask)
    _, state = lm(tokens[:, :60], document_start_mask=mask[:, :60])
    rows = torch.tensor([2, 0, 0])
    found, _ = lm(tokens[rows, 60:], state.select(rows), document_start_mask=mask[rows, 60:])
    assert_same(found, whole[rows, 60:])


@shapes
def test_what_resets_add_to_a_state(config: ModelConfig) -> None:
    """Where each sequence's document began; nothing before the first mask, and of the same size after many."""
    lm, tokens, mask = double(config), tokens_of(config, 3, 60), document_starts(LENGTHS)[:, :60]
    _, plain = lm(tokens)
    _, state = lm(tokens, document_start_mask=mask)
    assert plain.document_start is None
    assert state.document_start.flatten().tolist() == [53, 7, 33]
    assert state.nbytes == plain.nbytes + 3 * 8
    assert state.document_start.untyped_storage().nbytes() == 3 * 8


@shapes
def test_positions_bound_a_document_and_not_the_context(config: ModelConfig) -> None:
    lm, tokens = create_lm(config, 0), tokens_of(config, 2, 200)
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, ::64] = True
    mask[1, ::50] = True
    _, state = lm(tokens, document_start_mask=mask)
    lm(tokens[:, :14], state)
    mask[0, 128] = False
    if config.positions is None:
        lm(tokens, document_start_mask=mask)
        return
    with pytest.raises(ValueError, match="a document of 128 tokens is longer than the model's 64 positions"):
        lm(tokens, document_start_mask=mask)
    with pytest.raises(ValueError, match="a document of 65 tokens is longer than the model's 64 positions"):
        lm(tokens[:, :15], state)


def test_a_reset_is_asked_of_every_token() -> None:
    lm = create_lm(SHAPES["gpt2"], 0)
    with pytest.raises(ValueError, match=r"has shape \(1, 20\); it must have the tokens' shape, \(2, 20\)"):
        lm(tokens_of(lm.config, 2, 20), document_start_mask=torch.zeros(1, 20, dtype=torch.bool))
