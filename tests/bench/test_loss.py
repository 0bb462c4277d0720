"""Costs of the loss beside its matrix products."""

import json
from pathlib import Path

from tests.conftest import fail, succeed, tostlm


def test_the_verb(tmp_path: Path) -> None:
    options = [
        "--width",
        "16",
        "--vocab-size",
        "50",
        "--tokens",
        "8,16",
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "l.json"),
    ]
    assert "products" in succeed(tostlm("bench", "loss", *options))
    costs = json.loads((tmp_path / "l.json").read_text())["costs"]
    assert [(cost["dtype"], cost["tokens"], cost["way"]) for cost in costs] == [
        (dtype, tokens, way)
        for dtype in ("fp32", "bf16")
        for tokens in (8, 16)
        for way in ("products", "tostlm", "torch")
    ]
    assert all(cost["products"] == 1 for cost in costs if cost["way"] == "products")
    fail(tostlm("bench", "loss", "--dtypes", "fp8"), "--dtypes fp8 is not known; use fp32, bf16")
