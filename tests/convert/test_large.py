"""A model larger than what a conversion keeps in memory."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, succeed
from tostlm.checkpoint import load_checkpoint
from tostlm.checkpoint.layout import TrainState
from tostlm.checkpoint.weights_only import write_weights
from tostlm.config import dump_config
from tostlm.model import count_parameters, weight_shapes

SHARD_MB = 500
LIMIT_KB = (3 * SHARD_MB // 2 << 10) + (1 << 20)  # 1.5 shards and 1 GiB


def peak_anonymous_kb(process: "subprocess.Popen[str]") -> int:
    """Return the most memory, beside mapped files, that a process has until it ends."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.05)
    return peak


@pytest.mark.slow
def test_a_billion_parameters_are_converted_a_shard_at_a_time(trained: dict[str, Run], tmp_path: Path) -> None:
    small = load_checkpoint(trained["tssa"].dir)
    model = replace(small.config.model, depth=24, width=2048, heads=16)
    assert count_parameters(model) > 1e9
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in weight_shapes(model).items()}
    source = tmp_path / "source"
    source.mkdir()
    config = dump_config(small.config.model_copy(update={"model": model})).encode()
    write_weights(source, weights, config, small.tokenizer, TrainState())
    del weights
    options = [str(source), "--to", "hf", str(tmp_path / "out"), "--shard-size", f"{SHARD_MB}MB"]
    command = [sys.executable, "-m", "tostlm", "convert", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = peak_anonymous_kb(process)
        succeed(subprocess.CompletedProcess(command, process.returncode, *process.communicate()))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 8
    assert peak < LIMIT_KB, peak
