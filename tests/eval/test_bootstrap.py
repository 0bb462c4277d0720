"""Intervals over documents: as wide as theory has them, and of documents, not of tokens."""

import numpy as np
import pytest

from tostlm.eval.bootstrap import Interval, ratio_interval


def test_it_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = ratio_interval(values * 30, np.full(400, 30.0))
    assert found.value == pytest.approx(values.mean())
    error = values.std(ddof=1) / 20
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_documents_count_by_their_tokens() -> None:
    nats, tokens = np.array([10.0, 400.0, 0.0]), np.array([10.0, 100.0, 0.0])
    assert ratio_interval(nats, tokens).value == pytest.approx(410 / 110)
    assert ratio_interval(nats[:1], tokens[:1]) == Interval(1.0, None, None)


def test_it_is_the_same_every_time() -> None:
    nats = np.random.default_rng(1).normal(5.0, 2.0, 50)
    assert ratio_interval(nats, np.ones(50)) == ratio_interval(nats, np.ones(50))
