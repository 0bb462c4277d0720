"""What a GPU is asked once there is one: `make gpu-check`. Parity, benchmarks and a run of 100 steps, as one file.

Nothing that it measures is held by a test: docs/results/gpu-NAME.json says what was seen on that GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from tests.conftest import ROOT
from tostlm.config import load_config
from tostlm.device import best_device, device_name
from tostlm.files import write_atomically
from tostlm.plan import memory

PARITY = ("tests/tssa/test_triton.py", "tests/chain/test_triton.py")
CHECKPOINTS_OFF = ("train.save_every_steps=100000", "train.eval_every_steps=100000", "train.eval_tokens=4096")


class Sizes(NamedTuple):
    """How much is asked."""

    parity: Sequence[str]  # files of tests
    operator: Sequence[str]  # options of the benchmarks
    training: Sequence[str]
    decoding: Sequence[str]
    run: Sequence[str]  # the config of the run, and overrides


FULL = Sizes(
    PARITY,
    ["--shapes", "768x12,1280x20", "--tokens", "4096,16384,65536"],
    ["tost-base", "gpt2-base", "transformers:gpt2-base", "--contexts", "1k,4k,16k,64k", "--tokens", "65536"],
    ["tost-base", "gpt2-base", "--contexts", "1k,8k"],
    ["tost-base", "train.steps=100", "train.batch_tokens=61440", "train.micro_batch_tokens=61440"],
)


def check(sizes: Sizes) -> dict[str, Any]:
    """Return what this machine's device says to all parts, by their names."""
    device = best_device()
    with TemporaryDirectory() as folder:
        place = Path(folder)
        return {
            "device": device_name(device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "parity": _parity(sizes.parity),
            "operator": _bench("operator", sizes.operator, place / "operator"),
            "training": _bench("train", sizes.training, place / "training.json"),
            "decoding": _bench("decode", sizes.decoding, place / "decoding.json"),
            "run": _run(sizes.run, place, on_gpu=device.type == "cuda"),
        }


def _parity(files: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"exit_code": done.returncode, "summary": done.stdout.splitlines()[-1]}


def _bench(name: str, options: Sequence[str], out: Path) -> Any:
    _tostlm("bench", name, *options, "--out", str(out))
    return json.loads(out.with_suffix(".json").read_text())


def _run(arguments: Sequence[str], folder: Path, on_gpu: bool) -> dict[str, Any]:
    """Train on this project's own pages; return the first and last loss, speed, and memory beside what is planned."""
    config, *overrides = arguments
    text = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in text))
    source = ["--source", str(folder / "pages.jsonl")]
    _tostlm("tokenizer", "train", *source, "--vocab-size", "1000", "--out", str(folder / "tokenizer.model"))
    prepared = [
        "--tokenizer",
        str(folder / "tokenizer.model"),
        "--heldout-fraction",
        "0.3",
        "--out",
        str(folder / "data"),
    ]
    _tostlm("prepare", *source, *prepared)
    own = [f"run_dir={folder}/run", f"data.path={folder}/data", *CHECKPOINTS_OFF, *overrides]
    _tostlm("train", config, *own, "train.log_every_steps=10", "--nproc", "1")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["kind"] == "train"]
    planned = memory(load_config(Path(config), own), 1, on_gpu).total
    shown = ("loss", "tokens_per_second", "mfu", "memory_bytes")
    return {
        "first_loss": first["loss"],
        **{name: last[name] for name in shown if name in last},
        "planned_memory_bytes": planned,
    }


def _tostlm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tostlm", *arguments], cwd=ROOT, check=True)


def main() -> None:
    """Write docs/results/gpu-NAME.json of this machine's GPU."""
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no GPU here; run it on a machine that has one, with torch's CUDA build")
    found = check(FULL)
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    write_atomically(ROOT / "docs" / "results" / f"gpu-{name}.json", json.dumps(found, indent=2) + "\n")
    print(json.dumps({key: found[key] for key in ("device", "parity", "run")}, indent=2))
    sys.exit(found["parity"]["exit_code"])


if __name__ == "__main__":
    main()
