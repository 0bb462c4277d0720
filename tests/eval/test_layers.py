"""What layers do by position: what the operator's own statistics say of the same tokens, read in one pass."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import FORGETTING, Run, fail, succeed, tostlm
from tostlm.checkpoint import load_checkpoint
from tostlm.data import VALIDATION, TokenSet, evenly_spread
from tostlm.errors import UserError
from tostlm.eval.layers import measure_layers, statistics_by_position
from tostlm.model import ModelConfig, create_lm
from tostlm.model.mixers.tssa import TSSAOptions
from tostlm.model.mixers.tssa_delta import TSSADeltaOptions
from tostlm.tssa import Inputs, tssa_statistics

BOUNDS = [10, 30, 31, 64]


@torch.no_grad()
def test_entropies_are_the_operators(trained: dict[str, Run], data: Path) -> None:
    lm = load_checkpoint(trained["tssa"].dir).lm
    row = torch.from_numpy(TokenSet(data, VALIDATION).read(0, 64))
    found = statistics_by_position(lm, row, BOUNDS)
    projected = []
    mixer: Any = lm.blocks[1].mixer
    hook = mixer.in_proj.register_forward_hook(lambda module, inputs, w: projected.append(w))
    lm(row[None])
    hook.remove()
    halflives = torch.tensor(FORGETTING["halflife_tokens"])
    whole = tssa_statistics(Inputs(projected[0], mixer.temp, None, 2 ** (-1 / halflives)))
    sizes = [10, 20, 1, 33]
    mean = sum(value * size for value, size in zip(found["entropy/1"], sizes, strict=True)) / 64
    assert mean == pytest.approx(float(whole.entropy), abs=1e-5)
    assert len(set(found["entropy/1"])) == 4


def test_horizons_and_gates_are_of_the_tokens_at_hand() -> None:
    ladder = TSSAOptions(forgetting="ladder", halflife_tokens=(2.0, 32.0))
    shell = TSSAOptions(forgetting="selective", query="own", membership="scale_free", gate="output")
    plan = (ladder, shell, TSSADeltaOptions())
    config = ModelConfig(3, 16, 2, 32, None, plan, layer_scale=None, norm="rmsnorm")
    lm, row = create_lm(config, seed=0), torch.randint(32, (40,), generator=torch.Generator().manual_seed(0))
    found = statistics_by_position(lm, row, [8, 40])
    assert found["shortest_horizon/0"] == pytest.approx([2 / math.log(2)] * 2)
    assert found["longest_horizon/0"] == pytest.approx([32 / math.log(2)] * 2)
    assert "entropy/1" not in found and "gate/2" not in found
    for layer in (1, 2):
        assert found[f"output_gate/{layer}"] == pytest.approx([0.5] * 2, abs=0.1)
    inputs: list[torch.Tensor] = []
    mixer: Any = lm.blocks[2].mixer
    hook = mixer.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
    with torch.no_grad():
        lm(row[None])
        hook.remove()
        log_decays, gate = mixer.memory.forgetting(inputs[0][:, 8:]), mixer.output.gate_proj(inputs[0][:, 8:])
    assert found["longest_horizon/2"][1] == pytest.approx(float((-1 / log_decays.mean((0, 1))).max()), rel=1e-5)
    assert found["output_gate/2"][1] == pytest.approx(float(gate.sigmoid().mean()), rel=1e-5)


def test_layers_without_forgetting_have_no_horizon() -> None:
    config = ModelConfig(1, 16, 2, 32, None, (TSSAOptions(),), layer_scale=None)
    found = statistics_by_position(create_lm(config, seed=0), torch.arange(20), [20])
    assert found.keys() == {"activation_rms/0", "entropy/0", "gate/0"}


def test_the_subcommand(trained: dict[str, Run], data: Path, tmp_path: Path) -> None:
    run = trained["tssa"].dir
    command = ("eval", "layers", str(run), "--contexts", "16,64", "--documents", "3", "--out", str(tmp_path))
    printed = succeed(tostlm(*command))
    written = json.loads((tmp_path / "layers.json").read_text())
    tokens, lm = TokenSet(data, VALIDATION), load_checkpoint(run).lm
    starts = [first for first, stop in tokens.document_bounds.tolist() if stop - first >= 64]
    rows = [torch.from_numpy(tokens.read(start, start + 64)) for start in evenly_spread(starts, 3)]
    found = [statistics_by_position(lm, row, [16, 64]) for row in rows]
    for name, values in written["statistics"].items():
        expected = [sum(of[name][n] for of in found) / 3 for n in (0, 1)]
        assert values == pytest.approx(expected, rel=1e-5)
        assert f"{values[0]:.4g}" in printed
    assert written["positions"] == [16, 64]


def test_a_model_that_diverged(trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(trained["tssa"].dir)
    with torch.no_grad():
        checkpoint.lm.embed.weight.fill_(torch.nan)
    monkeypatch.setattr("tostlm.eval.layers.load_checkpoint", lambda *_: checkpoint)
    with pytest.raises(UserError, match="its activations are not finite; the model has diverged"):
        measure_layers(trained["tssa"].dir, None, [16], 1, tmp_path)


def test_mistakes(trained: dict[str, Run], tmp_path: Path) -> None:
    command = ("eval", "layers", "--out", str(tmp_path))
    fail(
        tostlm(*command, str(trained["softmax"].dir), "--contexts", "32,128"),
        "--contexts 128 is beyond the 64 positions",
    )
    fail(tostlm(*command, str(trained["tssa"].dir), "--contexts", "1M"), "has 1,048,576 tokens; use shorter --contexts")
    fail(tostlm(*command, str(tmp_path), "--contexts", "16"), str(tmp_path))
