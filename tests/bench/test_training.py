"""The bench measures what it says; how fast anything is, no test decides."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tostlm.bench import training
from tostlm.bench.contenders import Contender, open_contenders
from tostlm.bench.training import Rate, bench_training, table
from tostlm.model import LM, count_parameters

CPU = torch.device("cpu")
GPT2 = str(ROOT / "configs" / "quickstart-gpt2.yaml")


class Toy(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(context, 8))


def toys(log: list[tuple[str, tuple[int, ...]]], **names: int) -> dict[str, Contender]:
    """Models of a table alone, whose loss copies it so many times."""

    def contender(name: str, copies: int) -> Contender:
        def loss(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            log.append((name, tuple(inputs.shape)))
            assert isinstance(module, Toy)
            return torch.stack([module.table.exp() for _ in range(copies)]).sum()

        return Contender(torch.float32, 32, lambda context, with_weights: Toy(context), loss)

    return {name: contender(name, copies) for name, copies in names.items()}


def test_every_model_at_every_context(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, tuple[int, ...]]] = []
    models = toys(log, a=1, b=2)
    monkeypatch.setattr(training, "_too_large", lambda *others: {})
    seconds = iter(range(1000))
    monkeypatch.setattr(training, "clock", lambda device: float(next(seconds)))
    found = list(bench_training(models, [32, 512], tokens=128, repeats=2, device=CPU))
    assert [[(rate.model, rate.context) for rate in rates] for rates in found] == [
        [("a", 32), ("b", 32)], [("a", 512), ("b", 512)]
    ]  # fmt: skip
    # The clock ticks at the start of a step, after its passes and at its end.
    assert [rate.tokens_per_second for rates in found for rate in rates] == [64, 64, 256, 256]
    assert [rate.pass_tokens_per_second for rates in found for rate in rates] == [128, 128, 512, 512]
    # They take turns, after steps that warm up and one whose memory is counted.
    turns = [name for name, shape in log if shape == (4, 32)]
    assert turns == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert {shape for _, shape in log} == {(4, 32), (1, 512)}


def test_memory_is_that_of_weights_moments_and_what_a_step_adds() -> None:
    (few,), (many,) = (next(bench_training(toys([], a=n), [1024], 1024, 1, CPU)) for n in (1, 9))
    table_bytes = 4 * 1024 * 8
    assert few.peak_bytes is not None and many.peak_bytes is not None
    # Each copy of the table stays for the backward pass; beside them there is once their stack.
    assert few.saved_bytes == pytest.approx(table_bytes, rel=0.01)
    assert many.saved_bytes == pytest.approx(9 * table_bytes, rel=0.01)
    assert few.peak_bytes >= (3 + 2) * table_bytes  # with weights and moments
    assert many.peak_bytes - few.peak_bytes >= 14 * table_bytes


def test_what_does_not_fit_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 4 * 1024 * 8 * 12
    monkeypatch.setattr(training, "free_bytes", lambda device: free)
    log: list[tuple[str, tuple[int, ...]]] = []
    (large, small), *_ = bench_training(toys(log, large=40, small=1), [1024], 1024, 1, CPU)
    assert small.tokens_per_second and large.tokens_per_second is None
    assert large.failure == f"needs {large.failure.split()[1]} MiB, 384 KiB are free" if large.failure else False
    assert "large" in table([large, small]) and "needs" in table([large, small])

    def exhausted(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "_too_large", lambda *others: {})
    models = {**toys(log, small=1), "other": toys(log, other=1)["other"]._replace(loss=exhausted)}
    (small, other), *_ = bench_training(models, [1024], 1024, 1, CPU)
    assert small.tokens_per_second and other.failure == "out of memory"


def test_ratios_are_of_the_first_model() -> None:
    lines = table([Rate("a", 64, 64, 3000, 4000, 2048, 1024), Rate("b", 64, 64, 1500, 2000, 1 << 20, 0)]).splitlines()
    assert lines[0].split() == ["context", "model", "tokens/s", "first", "/", "it", "peak", "saved"]
    assert lines[1].split() == ["64", "a", "3,000", "1.00x", "2", "KiB", "1", "KiB"]
    assert lines[2].split()[:4] == ["64", "b", "1,500", "2.00x"]


def test_transformers_gpt2_has_the_configs_shape(tmp_path: Path) -> None:
    models = open_contenders([GPT2, f"transformers:{GPT2}"], compiled=False)
    own, theirs = (contender.create(64, False) for contender in models.values())
    assert list(models) == ["quickstart-gpt2", "transformers-quickstart-gpt2"] and isinstance(own, LM)
    positions = 64 * own.config.width
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(own.config) + positions
    tokens = torch.randint(64, (2, 64))
    with torch.no_grad():
        for contender in models.values():
            loss = contender.loss(contender.create(64, True), tokens, tokens.roll(-1, 1))
            assert loss.item() == pytest.approx(torch.tensor(float(contender.vocab_size)).log().item(), abs=0.3)
    theirs.config.save_pretrained(tmp_path / "folder")  # type: ignore[operator]
    (_, folder) = open_contenders([GPT2, str(tmp_path / "folder")], compiled=False).values()
    assert folder.create(32, False).config.n_layer == own.config.depth


def test_the_verb(run: Run, tmp_path: Path) -> None:
    options = ["--contexts", "32,64", "--tokens", "64", "--repeats", "1", "--threads", "1"]
    printed = succeed(tostlm("bench", "train", str(run.file), GPT2, *options, "--out", str(tmp_path / "r.json")))
    assert "first / it" in printed and "quickstart-gpt2" in printed
    written = json.loads((tmp_path / "r.json").read_text())
    assert [rate["context"] for rate in written["rates"]] == [32, 32, 64, 64]
    for rate in written["rates"]:
        assert 0 < rate["tokens_per_second"] < rate["pass_tokens_per_second"]
        assert 0 < rate["saved_bytes"] < rate["peak_bytes"]
    assert "1 threads" in written["machine"]


def test_finished_contexts_are_kept_where_a_benchmark_ends(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "r.json"

    def stop(device: torch.device) -> int:
        if out.exists():
            raise KeyboardInterrupt
        return 1 << 40

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "free_bytes", stop)
        training.report_training([str(run.file)], [32, 64], 64, 1, None, False, out)
    assert [rate["context"] for rate in json.loads(out.read_text())["rates"]] == [32]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["no-such"], ["no-such"]),
        (["transformers:quickstart"], ["transformers:quickstart: transformers' GPT-2 has positions"]),
    ],
)
def test_mistakes(models: list[str], words: list[str]) -> None:
    fail(tostlm("bench", "train", *models), *words)


def test_a_folder_alone_has_no_dtype(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    fail(tostlm("bench", "train", str(tmp_path)), "name a config first")
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    fail(tostlm("bench", "train", GPT2, str(tmp_path)), "is of no model that transformers has")
