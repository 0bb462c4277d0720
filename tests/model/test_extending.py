"""docs/extending.md's mixer, added as one file: it trains, resumes on other ranks, streams, generates and exports."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run
from tostlm.checkpoint import checkpoints
from tostlm.model import Mixer
from tostlm.model.mixers.tssa import TSSAOptions

MIXER = "decaying_sum"
LAYERS = f"model.layers=[{{mixer: {MIXER}, decay: 0.8}}, {{mixer: tssa}}]"

# What follows training, in one process: streaming, cost, generation and export.
AFTER_TRAINING = """
import json, sys, torch
from pathlib import Path
from tostlm.checkpoint import load_checkpoint
from tostlm.convert import convert, sample, write_hf
from tostlm.eval.sampling import Sampling
from tostlm.eval.writer import Writer
from tostlm.model import state_bytes, training_flops_per_token

checkpoint = load_checkpoint(Path(sys.argv[1]))
lm, shape = checkpoint.lm, checkpoint.config.model
tokens = torch.randint(shape.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
starts = tokens < 30
whole, end = lm(tokens, document_start_mask=starts)
state, pieces = None, []
for piece, mask in zip(tokens.split([17, 1, 22], 1), starts.split([17, 1, 22], 1)):
    logits, state = lm(piece, state, document_start_mask=mask)
    pieces.append(logits)
torch.testing.assert_close(torch.cat(pieces, 1), whole)
alone, _ = lm(tokens[:1, int(starts[0].nonzero()[-1]):])
torch.testing.assert_close(alone[0, -1], whole[0, -1])
start = [checkpoint.tokenizer.eos_id]
writer = Writer(lm, shape.vocab_size, Sampling(temperature=0), [0])
writer.read(torch.tensor([start]))
written = [int(writer.write()[0]) for _ in range(5)]
convert(checkpoint, Path(sys.argv[2]), write_hf)
print(json.dumps({
    "module": type(lm.blocks[0].mixer).__module__, "state": state.nbytes, "state_bytes": state_bytes(shape, 40),
    "flops": training_flops_per_token(shape, 64), "written": written, "logits": whole[0, -1].tolist(),
    "tokens": tokens[0].tolist(), "sample": sample(Path(sys.argv[2]), "Fellow", tokens=3),
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tostlm with the documented mixer added as one file; what PYTHONPATH is to hold."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "tostlm", folder / "tostlm", ignore=shutil.ignore_patterns("__pycache__"))
    source = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[0]
    assert len(source.splitlines()) < 60
    (folder / "tostlm" / "model" / "mixers" / f"{MIXER}.py").write_text(source)
    return folder


def python(package: Path, *arguments: str, fails: bool = False) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stderr if fails else result.stdout


def test_a_mixer_in_one_file(package: Path, run: Run, tmp_path: Path) -> None:
    stateful = ["data.stateful=true", "data.reset_at_documents=true"]
    command = ["-m", "tostlm", "train", str(run.file), LAYERS, *stateful]
    python(package, *command, "--nproc", "2")
    losses = run.metrics("train")
    shutil.rmtree(checkpoints(run.dir)[-1])
    python(package, *command, "train.micro_batch_tokens=256", "--nproc", "1")
    assert run.metrics("train") == pytest.approx(losses, abs=1e-4)

    out = tmp_path / "hf"
    found = json.loads(python(package, "-c", AFTER_TRAINING, str(run.dir), str(out)).splitlines()[-1])
    assert found["module"] == f"tostlm.model.mixers.{MIXER}"
    C, H, V = 32, 2, 512
    assert found["state_bytes"] == 4 * C + 8 * (2 * C + H)
    assert found["state"] == 2 * (found["state_bytes"] + 8)  # two sequences, each with the start of its document
    per_block = 2 * 2 * C * C + 2 * 8 * C * C
    assert found["flops"] == 3 * (2 * V * C + 2 * per_block + 2 * C + 12 * C)
    assert len(found["written"]) == 5
    assert found["sample"].startswith("Fellow")
    assert {path.name for path in out.glob(f"*{MIXER}*")} == {f"tostlm_model_mixers_{MIXER}.py"}


def test_a_mixer_that_cannot_share_contexts_says_so(package: Path, run: Run) -> None:
    command = ["-m", "tostlm", "train", str(run.file), LAYERS, "train.context_parallel_size=2", "--nproc", "2"]
    assert f"{MIXER} layers cannot share a context" in python(package, *command, fails=True)


def test_two_mixers_cannot_share_a_name() -> None:
    with pytest.raises(TypeError, match="'tssa' is taken or empty"):
        type("Other", (Mixer,), {"options_class": TSSAOptions})
