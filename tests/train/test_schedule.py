"""The learning rate as a function of the step."""

import pytest
from tostlm.train.schedule import learning_rate

from tests.conftest import Run


def test_cosine(run: Run) -> None:
    config = run.config("train.steps=100", "optimizer.warmup_steps=10", "optimizer.lr=1.0", "optimizer.min_lr=0.1")
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_warmup_stable_decay(run: Run) -> None:
    config = run.config(
        "train.steps=100",
        "optimizer.warmup_steps=10",
        "optimizer.lr=1.0",
        "optimizer.min_lr=0.0",
        "optimizer.schedule=wsd",
        "optimizer.decay_steps=20",
    )
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0
