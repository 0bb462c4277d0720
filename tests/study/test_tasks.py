"""What the synthetic tasks ask, and that models learn them."""

import pytest
import torch

from tostlm.model import IGNORE, ModelConfig
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.tssa_cross import TSSACrossOptions
from tostlm.study.probe import probe
from tostlm.study.tasks import Task, induction, ngrams, recall


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_recall_asks_for_the_value_of_every_key() -> None:
    tokens, targets, _ = recall(generator(), 20, 64, 40, 9)
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(sequence[:18:2], sequence[1:18:2], strict=True))
        assert len(pairs) == 9
        asked = [place for place, answer in enumerate(answers) if answer != IGNORE]
        assert sorted(sequence[place] for place in asked) == sorted(pairs)
        assert all(answers[place] == pairs[sequence[place]] for place in asked)
        assert all(token == 0 for place, token in enumerate(sequence) if place >= 18 and place not in asked)


def test_induction_asks_for_what_followed_before() -> None:
    tokens, targets, _ = induction(generator(), 50, 24, 30)
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert sequence.count(0) == 2
        assert answers == [IGNORE] * 23 + [sequence[sequence.index(0) + 1]]


def test_the_best_loss_of_chains_is_that_of_counting() -> None:
    """A predictor that counts transitions from one reaches it, and no other smoothing is below it."""
    tokens, targets, best = ngrams(generator(), 500, 40, 6)

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


LEARNERS = (
    TSSACrossOptions(halflife_tokens=(256.0, 256.0)),
    pytest.param(SoftmaxOptions(rotary_base=1e4, short_conv=2), marks=pytest.mark.slow),
)


@pytest.mark.parametrize("options", LEARNERS, ids=lambda o: o.mixer)
def test_models_learn_to_recall(options: SoftmaxOptions | TSSACrossOptions) -> None:
    model = ModelConfig(2, 32, 1, 8, None, (options,), layer_scale=None, norm="rmsnorm", output_init="zero")
    task = Task(kind="recall", tokens=24, pairs=2, vocab_size=16, steps=400, batch_tokens=1536)
    found = probe(model, task, 3e-3, seed=0)
    assert found.keys() == {"24", "96"}
    assert found["24"][0] > 0.9
    untrained = probe(model, task.model_copy(update={"steps": 1}), 3e-3, seed=0)
    assert untrained["24"][0] < 0.3
