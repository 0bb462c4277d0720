"""Costs of mixers beside a linear layer."""

import json
from pathlib import Path

import torch

from tests.conftest import fail, succeed, tostlm
from tostlm.bench.mixers import bench_mixers, table
from tostlm.model import MIXERS


def test_every_mixer_has_a_cost() -> None:
    names = sorted(MIXERS)
    costs = bench_mixers(names, 16, 2, 8, 1, torch.device("cpu"))
    assert [cost.layer for cost in costs] == ["linear", *names]
    by_name = {cost.layer: cost for cost in costs}
    assert by_name["softmax"].weights == 4.0  # queries, keys, values and the output
    assert by_name["softmax"].state_bytes == 8 * 2 * 16 * 4
    assert by_name["linear"].linears == 1.0
    assert len(table(costs).splitlines()) == len(costs) + 1


def test_the_verb(tmp_path: Path) -> None:
    options = ["--shape", "16x2", "--tokens", "8,16", "--repeats", "1", "--out", str(tmp_path / "m.json")]
    printed = succeed(tostlm("bench", "mixers", "--mixers", "tssa_cross,softmax", *options))
    assert "linears" in printed
    written = json.loads((tmp_path / "m.json").read_text())["costs"]
    assert [(cost["layer"], cost["tokens"]) for cost in written] == [
        (layer, tokens) for tokens in (8, 16) for layer in ("linear", "tssa_cross", "softmax")
    ]
    fail(tostlm("bench", "mixers", "--mixers", "tsa"), "--mixers tsa is not known; use ")
    fail(tostlm("bench", "mixers", "--shape", "16x3"), "--shape 16x3 must be WIDTHxHEADS")
