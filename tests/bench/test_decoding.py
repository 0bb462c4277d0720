"""The bench measures what it says; how fast anything is, no test decides."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tostlm.bench.decoding import Decoding, bench_decoding, table
from tostlm.config import load_config
from tostlm.eval import Writer
from tostlm.model import LM, state_bytes

SMALL = ["model.depth=1", "model.width=8", "model.heads=1", "model.vocab_size=32"]


def test_models_take_turns_after_the_same_context(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int, int]] = []
    hidden, write = LM.hidden, Writer.write

    def record(lm: LM, tokens: torch.Tensor, state: object = None) -> object:
        read.append((lm.config.layers[0].mixer, tokens.shape[1], state.tokens if state else 0))
        return hidden(lm, tokens, state)

    def count(writer: Writer) -> torch.Tensor:
        read.append(("write", 0, 0))
        return write(writer)

    monkeypatch.setattr(LM, "hidden", record)
    monkeypatch.setattr(Writer, "write", count)
    names = {"tost": "quickstart", "gpt2": "gpt2-base"}
    models = {name: load_config(ROOT / "configs" / f"{file}.yaml", SMALL).model for name, file in names.items()}
    found = bench_decoding(models, [20, 40], tokens=2, batch=3, device=torch.device("cpu"))
    # All but the last token of a context, then in turn the forward pass alone and the same one as `generate` does it.
    cases = [(mixer, context - 1) for context in (20, 40) for mixer in ("tssa_delta", "softmax")]
    expected = [(mixer, length, 0) for mixer, length in cases]
    for written in range(3):
        for mixer, length in cases:
            expected += [(mixer, 1, length + written), ("write", 0, 0), (mixer, 1, length + written)]
    assert read == expected
    found = found[2:]
    assert [(decoding.model, decoding.context) for decoding in found] == [("tost", 40), ("gpt2", 40)]
    assert found[1].state_bytes == state_bytes(models["gpt2"], 42)
    assert found[0].state_bytes == state_bytes(models["tost"], 42) == state_bytes(models["tost"], 4200)


def test_ratios_are_to_the_first_model() -> None:
    lines = table([Decoding("a", 64, 2.0, 2.2, 9.0, 2048), Decoding("b", 64, 5.0, 5.0, 9.0, 1 << 20)]).splitlines()
    assert lines[0].split()[:3] == ["context", "a", "b"]
    assert "2.00 (1.00x; 1.10x), 2 KiB" in lines[1]
    assert "5.00 (2.50x; 1.00x), 1,024 KiB" in lines[1]


def test_the_verb(run: Run, tmp_path: Path) -> None:
    configs = [str(run.file), str(ROOT / "configs" / "quickstart-gpt2.yaml")]
    options = ["--contexts", "32,64", "--tokens", "2", "--threads", "1", "--batch", "2"]
    printed = succeed(tostlm("bench", "decode", *configs, *options, "--out", str(tmp_path / "d.json")))
    assert "quickstart-gpt2" in printed
    written = json.loads((tmp_path / "d.json").read_text())
    assert [decoding["context"] for decoding in written["decode"]] == [32, 32, 64, 64]
    assert all(decoding["milliseconds"] > 0 for decoding in written["decode"])
    fail(tostlm("bench", "decode", configs[0], "--contexts", "x"), "--contexts 'x' must be whole numbers above 1")
