"""Preparation is timed beside the tokenizer's own encoding of the same text."""

import json
from pathlib import Path

from tests.conftest import succeed, tostlm
from tostlm.data import Tokenizer


def test_rates_and_their_ratios(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    out = tmp_path / "rates.json"
    command = ["bench", "data", str(corpus), "--tokenizer", str(tmp_path / "t.model"), "--text-bytes", "1000000"]
    printed = succeed(tostlm(*command, "--repeats", "1", "--out", str(out)))
    rates = json.loads(out.read_text())
    assert 1_000_000 <= rates["text_bytes"] < 1_010_000
    ratio = rates["prepare_bytes_per_second"] / rates["encode_bytes_per_second"]
    assert f"{ratio:.0%} of it" in printed
    assert f"{rates['loader_seconds_per_token'] * 10_000:.3%} of a step at 10,000 tokens/s" in printed
    assert f"MB in {rates['documents']:,} documents, 1 cores" in printed
    assert rates["writer_bytes_per_second"] > rates["encode_bytes_per_second"]
    succeed(tostlm(*command, "--repeats", "1", "--document-characters", "10", "--out", str(out)))
    assert json.loads(out.read_text())["documents"] > 90_000
