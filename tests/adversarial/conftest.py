"""How many times more cases are drawn, and from which seed: `pytest tests/adversarial -m slow --cases 10 --seed 7`."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed"))


@pytest.fixture(scope="session")
def numbers(request: pytest.FixtureRequest) -> Callable[[int], range]:
    """The numbers of the cases to draw where there are usually so many."""
    case = request.config.getoption("--case")
    factor = float(request.config.getoption("--cases"))
    return lambda cases: range(round(cases * factor)) if case is None else range(int(case), int(case) + 1)
