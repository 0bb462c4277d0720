"""What the synthetic sequences ask, and that it can be answered."""

import statistics

import pytest
import torch

from tostlm.eval.synthetic import BLANK, induction, listops, ngrams, recall, selective_copy
from tostlm.model import IGNORE


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_recall_asks_for_the_value_of_every_key() -> None:
    tokens, targets, *_ = recall(generator(), 20, 64, 40, 9)
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(sequence[:18:2], sequence[1:18:2], strict=True))
        assert len(pairs) == 9
        asked = [place for place, answer in enumerate(answers) if answer != IGNORE]
        assert sorted(sequence[place] for place in asked) == sorted(pairs)
        assert all(answers[place] == pairs[sequence[place]] for place in asked)
        assert all(token == 0 for place, token in enumerate(sequence) if place >= 18 and place not in asked)


def test_induction_asks_for_what_followed_before() -> None:
    tokens, targets, *_ = induction(generator(), 50, 24, 30)
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert sequence.count(0) == 2
        assert answers == [IGNORE] * 23 + [sequence[sequence.index(0) + 1]]


def test_the_best_loss_of_chains_is_that_of_counting() -> None:
    """A predictor that counts transitions from one reaches it, and no other smoothing is below it."""
    tokens, targets, best, _ = ngrams(generator(), 500, 40, 6)

    def loss(smoothing: float) -> float:
        counts = torch.full((500, 6, 6), smoothing, dtype=torch.float64)
        rows, total = torch.arange(500), 0.0
        for now, following in zip(tokens.T, targets.T, strict=True):
            seen = counts[rows, now]
            total -= float((seen[rows, following] / seen.sum(-1)).log().mean()) / 40
            counts[rows, now, following] += 1
        return total

    assert loss(1.0) == pytest.approx(best)
    assert min(loss(0.5), loss(2.0)) > best
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_the_best_prediction_of_chains_has_the_best_loss() -> None:
    _, targets, best_loss, best = ngrams(generator(), 20, 30, 5)
    assert torch.allclose(best.sum(-1), torch.ones(20, 30, dtype=torch.float64))
    assert float(-best.gather(-1, targets[..., None]).log().mean()) == pytest.approx(best_loss)


def test_selective_copying_asks_for_the_items_in_order() -> None:
    tokens, targets, *_ = selective_copy(generator(), 30, 40, 12, 7)
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        items = [token for token in sequence[:33] if token != BLANK]
        assert len(items) == 7 and min(items) >= 2
        assert sequence[33:] == [1] * 7
        assert answers == [IGNORE] * 33 + items
    assert len({tuple(sequence.nonzero().flatten().tolist()) for sequence in tokens}) > 20


def evaluate(tokens: list[int]) -> int:
    """The result of an expression, by a stack."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token <= 10:
            stack[-1].append(token - 1)
        elif token < 15:
            stack.append([token])
        else:
            operation, *digits = stack.pop()
            results = {11: max(digits), 12: min(digits), 13: statistics.median_low(digits), 14: sum(digits) % 10}
            stack[-1].append(results[operation])
    assert len(stack) == 1 and len(stack[0]) == 1
    return stack[0][0]


@pytest.mark.parametrize("length", [5, 8, 9, 33, 256])
def test_listops_asks_for_the_result(length: int) -> None:
    tokens, targets, *_ = listops(generator(), 100, length)
    results = []
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        expression = [token for token in sequence[:-1] if token != BLANK]
        assert sequence == [BLANK] * (length - 1 - len(expression)) + expression + [16]
        assert answers == [IGNORE] * (length - 1) + [1 + evaluate(expression)]
        results.append(evaluate(expression))
    assert len(set(results)) == 10
    assert (tokens == BLANK).sum(1).float().mean() < 0.75 * length
