"""The operator's bench compares what computes the same."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import fail, succeed, tostlm
from tostlm.bench.operator import Shape, Timing, authors, table
from tostlm.tssa import tssa


def test_the_authors_operations_are_the_operator() -> None:
    w, temp = torch.randn(2, 90, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(authors(w, temp), tssa(w, temp)[0], rtol=1e-4, atol=1e-5)


def test_ratios() -> None:
    shape = Shape(768, 12, 4096, "bf16")
    seconds = {"authors": (12.0, 40.0), "cpp": (1.0, 2.0), "linear": (10.0, 20.0), "copy": (0.5, 0.5)}
    timings = [Timing(shape, name, *both) for name, both in seconds.items()]
    row = table(timings, ["cpp"]).splitlines()[1].split()
    assert row == ["768", "12", "4096", "bf16", "cpp", "12", "20", "0.1", "0.1", "2", "4.883e+05"]


def test_the_verb(tmp_path: Path) -> None:
    sizes = ["--shapes", "64x4", "--tokens", "64,256", "--dtypes", "fp32", "--repeats", "1"]
    printed = succeed(tostlm("bench", "operator", *sizes, "--backends", "torch", "--out", str(tmp_path / "operator")))
    assert len(printed.splitlines()) == 4
    assert (tmp_path / "operator.txt").read_text() == printed
    timings = json.loads((tmp_path / "operator.json").read_text())["timings"]
    assert {timing["what"] for timing in timings} == {"authors", "torch", "linear", "copy"}
    assert all(0 < timing["forward"] <= timing["both"] for timing in timings)
    assert (tmp_path / "operator.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--shapes", "64x5", "as in 768x12"), ("--dtypes", "int8", "use fp32, bf16"), ("--backends", "mps", "use triton")],
)
def test_mistakes(option: str, value: str, words: str) -> None:
    fail(tostlm("bench", "operator", "--tokens", "16", option, value), words)
