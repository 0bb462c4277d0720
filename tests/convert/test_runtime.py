"""Programs for runtimes compute what the model does, step after step, without the project's code."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import Checkpoint, load_checkpoint
from tostlm.convert import FORMATS, convert, runtime
from tostlm.errors import UserError
from tostlm.model import MIXERS, create_lm
from tostlm.model.mixers.combiner import CombinerOptions
from tostlm.model.mixers.induction import InductionOptions
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.tssa import TSSAOptions
from tostlm.model.mixers.tssa_delta import TSSADeltaOptions

# What a downstream user runs; tostlm cannot be imported there.
DOWNSTREAM = """
import json, sys
sys.modules["tostlm"] = None
import safetensors.torch, torch
folder, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
about = json.load(open(f"{folder}/decoder.json"))
start = safetensors.torch.load_file(f"{folder}/start.safetensors")
state, read, logits = [start[entry["name"]] for entry in about["state"]], 1, [start["logits"]]
step, prefill = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("step", "prefill"))
while read - 1 < tokens.shape[1]:
    whole = read - 1 + about["prefill_tokens"] <= tokens.shape[1]
    piece = tokens[:, read - 1 :][:, : about["prefill_tokens"] if whole else 1]
    after, state = (prefill if whole else step)(piece, torch.arange(read, read + piece.shape[1]), state)
    read += piece.shape[1]
    logits.append(after)
print(json.dumps(torch.cat(logits).tolist()))
"""


def untrained(trained: dict[str, Run], **switches: object) -> Checkpoint:
    """A checkpoint of another model, in which nothing is zero."""
    checkpoint = load_checkpoint(trained["tssa"].dir)
    lm = create_lm(dataclasses.replace(checkpoint.config.model, **switches), 0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in lm.requires_grad_(False).parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return checkpoint._replace(lm=lm)


SHIPPED = (TSSAOptions(), TSSADeltaOptions(), InductionOptions(), SoftmaxOptions())  # of the shipped configs


def every_mixer() -> tuple[object, ...]:
    return tuple(mixer.options_class() for name, mixer in sorted(MIXERS.items()) if name != "combiner")


@pytest.mark.parametrize(
    "layers", [SHIPPED, pytest.param(every_mixer(), marks=pytest.mark.slow)], ids=["shipped", "all"]
)
def test_programs_run_without_the_project(trained: dict[str, Run], tmp_path: Path, layers: tuple[object, ...]) -> None:
    """A prompt of two pieces and five steps, by a model of several mixers."""
    checkpoint = untrained(trained, layers=layers, depth=len(layers), layer_scale=0.5)
    out, length = tmp_path / "out", 16
    convert(checkpoint, out, lambda source, folder: runtime.write_torch_export(source, folder, prefill_tokens=length))
    tokens = torch.arange(3, 3 + 2 * length + 5)
    done = subprocess.run(
        [sys.executable, "-c", DOWNSTREAM, str(out), json.dumps(tokens.tolist())],
        capture_output=True,
        text=True,
        cwd=out,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    whole = torch.cat([torch.tensor([checkpoint.tokenizer.eos_id]), tokens])[None]
    expected = checkpoint.lm(whole)[0][0, [0, length, 2 * length, *range(2 * length + 1, 2 * length + 6)]]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-3, atol=1e-4)


def test_onnx_computes_the_same_for_1000_steps(trained: dict[str, Run], tmp_path: Path) -> None:
    checkpoint = untrained(trained, layers=SHIPPED, depth=len(SHIPPED), positions=1024, layer_scale=0.5)
    convert(checkpoint, tmp_path / "out", FORMATS["onnx"].write)
    about = json.loads((tmp_path / "out" / "decoder.json").read_text())
    start = safetensors.torch.load_file(tmp_path / "out" / "start.safetensors")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "step.onnx"), providers=["CPUExecutionProvider"])
    names = [entry["name"] for entry in about["state"]]
    assert [output.name for output in session.get_outputs()] == ["logits", *(f"out.{name}" for name in names)]
    state = [start[name].numpy() for name in names]
    _, own = checkpoint.lm(torch.tensor([[checkpoint.tokenizer.eos_id]]))
    generator = np.random.default_rng(0)
    for step in range(1, 1001):
        token = generator.integers(0, 512, (1, 1))
        given = {"tokens": token, "positions": np.array([step])} | {
            f"in.{n}": x for n, x in zip(names, state, strict=True)
        }
        logits, *state = session.run(None, given)
        expected, own = checkpoint.lm(torch.from_numpy(token), own)
        torch.testing.assert_close(torch.from_numpy(logits), expected[:, 0], rtol=1e-3, atol=1e-4)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".onnx", ".json", ".safetensors"}  # one file


@pytest.mark.slow
def test_onnx_holds_every_mixer(trained: dict[str, Run], tmp_path: Path) -> None:
    layers = every_mixer()
    checkpoint = untrained(trained, layers=layers, depth=len(layers), positions=None, layer_scale=0.5)
    convert(checkpoint, tmp_path / "out", FORMATS["onnx"].write)


def test_runs_are_converted(trained: dict[str, Run], tmp_path: Path) -> None:
    out = (str(tmp_path / "programs"), "--prefill-tokens", "8")
    said = succeed(tostlm("convert", str(trained["softmax"].dir), "--to", "torch-export", *out))
    assert "logits of " in said and " x 8 tokens: " in said
    assert json.loads((tmp_path / "programs" / "decoder.json").read_text())["prefill_tokens"] == 8
    said = succeed(tostlm("convert", str(trained["tssa"].dir), "--to", "onnx", str(tmp_path / "onnx")))
    assert "onnxruntime reads step.onnx" in said


def test_what_a_program_cannot_compute_is_not_published(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    combiner = untrained(trained, layers=(CombinerOptions(),), layer_scale=0.5)  # reads by places that vary
    with pytest.raises(UserError, match=r"logits of .* differ from the source's by .* nothing was published"):
        convert(combiner, out, FORMATS["torch-export"].write)
    monkeypatch.setattr(runtime, "ONNX_BYTES", 1000)
    with pytest.raises(UserError, match="bytes of weights, and an ONNX file holds 1,000"):
        convert(load_checkpoint(trained["tssa"].dir), out, FORMATS["onnx"].write)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"--to onnx takes `pip install 'tostlm\[onnx\]'`"):
        convert(load_checkpoint(trained["tssa"].dir), out, FORMATS["onnx"].write)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"--to int8 takes `pip install 'tostlm\[int8\]'`"):
        convert(load_checkpoint(trained["tssa"].dir), out, FORMATS["int8"].write)
    fail(
        tostlm("convert", str(trained["tssa"].dir), "--to", "onnx", str(out), "--data", "x"),
        "--data goes with --to int8",
    )
    assert not list(tmp_path.iterdir())
