"""The page on training benchmarks says what their numbers do."""

import json
from pathlib import Path

import pytest

from tests.conftest import fail, succeed, tostlm
from tostlm.bench.scaling import crossover, exponent
from tostlm.bench.training import Rate

CONTEXTS = (1024, 4096, 16384, 65536)


def rates(model: str, power: float, first: float, contexts: tuple[int, ...] = CONTEXTS) -> list[Rate]:
    """Of a model whose time and memory for a sequence grow as its length to a power."""
    return [
        Rate(model, n, 65536, first * (n / 1024) ** (1 - power), 1.0, 1 << 30, int(1e9 * (n / 1024) ** (power - 1)))
        for n in contexts
    ]


def test_exponents_are_those_of_the_numbers() -> None:
    for power in (1.0, 1.5, 2.0):
        own = rates("a", power, 1000.0)
        assert exponent(own, lambda rate: 1 / (rate.tokens_per_second or 0)) == pytest.approx(power)
        assert exponent(own, lambda rate: (rate.saved_bytes or 0) / rate.tokens) == pytest.approx(power, abs=1e-6)
    assert exponent(rates("a", 1.0, 1.0, (512, 1024, 4096)), lambda rate: 1.0) is None


def test_a_model_overtakes_another_where_their_curves_meet() -> None:
    linear, quadratic = rates("a", 1.0, 1000.0), rates("b", 2.0, 4000.0)
    assert crossover(linear, quadratic) == pytest.approx(4096)
    assert crossover(quadratic, linear) is None
    assert crossover(rates("a", 1.0, 9000.0), quadratic) is None
    # What could not be measured is left out.
    assert crossover(linear, [rate for rate in quadratic if rate.context != 4096]) == pytest.approx(4096)


def test_the_page(tmp_path: Path) -> None:
    failed = Rate("b", 65536, 65536, failure="out of memory")
    found = [*rates("a", 1.0, 1000.0), *rates("b", 2.0, 4000.0)[:3], failed, *rates("c", 1.0, 10.0)]
    found.sort(key=lambda rate: rate.context)
    file, page = tmp_path / "base.json", tmp_path / "page.md"
    file.write_text(json.dumps({"machine": "a machine", "rates": [rate._asdict() for rate in found]}))
    printed = succeed(tostlm("bench", "report", str(file), "--out", str(page)))
    assert page.read_text() == printed
    assert "| a | 1.00 | 1.00 |" in printed and "| b | 2.00 | 2.00 |" in printed
    assert "a overtakes b at 4,096 tokens of context." in printed
    assert "a is faster than c at every context." in printed
    assert "out of memory" in printed and "a machine." in printed
    assert (tmp_path / "page-1.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rates": [{"model": "a"}]}')
    page = str(tmp_path / "page.md")
    fail(tostlm("bench", "report", str(other), "--out", page), "is no file of `tostlm bench train --out`")
    fail(tostlm("bench", "report", str(tmp_path / "none.json"), "--out", page), "none.json cannot be read")
    fail(tostlm("bench", "report", str(other), "--out", str(tmp_path / "page.txt")), "must be a .md file")
    assert not (tmp_path / "page.md").exists()
