"""How many times more cases are drawn, and from which seed: `pytest tests/adversarial -m slow --cases 10 --seed 7`."""

import pytest


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed"))


@pytest.fixture(scope="session")
def factor(request: pytest.FixtureRequest) -> float:
    """By how much more cases than usual are drawn."""
    return float(request.config.getoption("--cases"))
