"""Verbs for runs and what comes of them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tostlm.cli.app import CheckpointPath, ConfigFile, Overrides, Threads, app, bench_app, eval_app
from tostlm.errors import UserError

if TYPE_CHECKING:
    from tostlm.launch import RankInfo

Processes = Annotated[int | None, typer.Option(min=1, help="processes on this machine; default: one a GPU, or one")]


@app.command()
def quickstart(
    configs: Annotated[Path, typer.Option(help="folder with quickstart.yaml and quickstart-gpt2.yaml")] = Path(
        "configs"
    ),
    nproc: Annotated[int, typer.Option(min=1, help="training processes")] = 2,
) -> None:
    """The whole way on presidential speeches, for ToST and GPT-2; a second run goes on where the first ended."""
    from tostlm.quickstart import quickstart as run

    run(configs, nproc)


@app.command()
def config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a run's resolved config, its parameters, steps and tokens."""
    from tostlm.config import dump_config, load_config
    from tostlm.model import count_parameters

    run = load_config(config, overrides or [])
    print(dump_config(run))
    print(f"# parameters       {count_parameters(run.model):,} without position embeddings")
    print(f"# tokens per step  {run.train.batch_tokens:,}")
    print(f"# steps            {run.train.steps:,}")
    print(f"# total tokens     {run.tokens:,}")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
) -> None:
    """Train a run from its newest checkpoint, or from the start.

    Under torchrun or a Slurm step the ranks come from there; otherwise --nproc processes are started here.
    """
    from tostlm.config import batch_plan, load_config

    run = load_config(config, overrides or [])
    ranks = _this_rank(["train", str(config), *(overrides or [])], nproc, lambda processes: batch_plan(run, processes))
    if ranks.rank == 0:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("tostlm").setLevel(logging.INFO)
    from tostlm.train import train as train_run

    train_run(run, ranks)


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    timeout_seconds: Annotated[float, typer.Option(min=1, help="a rank that does not answer within it is unfit")] = 120,
    out: Annotated[
        Path | None, typer.Option(help="a .json file to write too, which names the hosts to exclude")
    ] = None,
) -> None:
    """Check on all ranks what would spoil a run, before it: software, devices, network, clocks, disk, data.

    The ranks are started as those of `tostlm train`.
    """
    from tostlm.config import load_config

    run = load_config(config, overrides or [])
    options = ["--timeout-seconds", str(timeout_seconds), *(["--out", str(out)] if out else [])]
    ranks = _this_rank(["doctor", str(config), *(overrides or []), *options], nproc)
    from tostlm.doctor import doctor as examine

    examine(run, ranks, timeout_seconds, out)


@eval_app.command("perplexity")
def eval_perplexity(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="checkpoints or folders of runs")],
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "128,256,512,1024",
    data: Annotated[
        Path | None, typer.Option(help="prepared data; default: the first checkpoint's, of a blend the first")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="windows scored at each context")] = 64,
    out: Annotated[Path | None, typer.Option(help="folder for .json, .csv, .png; default: the first run's")] = None,
) -> None:
    """Perplexity on held-out documents at growing contexts, the same tokens scored at every one."""
    from tostlm.eval.command import perplexity

    print(perplexity(checkpoints, _numbers(contexts, "--contexts"), data, windows, out))


@app.command()
def generate(
    checkpoint: CheckpointPath,
    prompt: Annotated[str, typer.Option(help="text to go on from; default: the start of a document")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="choose among this many")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
) -> None:
    """Write text with a checkpoint."""
    from tostlm.eval.command import write_text

    print(write_text(checkpoint, prompt, tokens, temperature, top_k, seed))


@bench_app.command("train")
def bench_train(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="runs whose models are compared")],
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "512,2048,8192",
    tokens: Annotated[int, typer.Option(min=1, help="tokens a pass")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="timed passes of each model")] = 5,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="a .json file to write too")] = None,
) -> None:
    """Training tokens a second of several models, taking turns, at growing contexts."""
    from tostlm.bench.command import training

    print(training(configs, _numbers(contexts, "--contexts"), tokens, repeats, threads, out))


@bench_app.command("operator")
def bench_operator(
    shapes: Annotated[str, typer.Option(help="WIDTHxHEADS, with commas between")] = "768x12,1280x20",
    tokens: Annotated[str, typer.Option(help="tokens of a sequence, with commas between")] = "1024,4096,16384,65536",
    dtypes: Annotated[str, typer.Option(help="of fp32, bf16, fp16, with commas between")] = "fp32,bf16",
    backends: Annotated[str, typer.Option(help="of torch, cpp, triton; default: those that serve here")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 5,
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="write OUT.json, OUT.txt and OUT.png too")] = None,
) -> None:
    """The TSSA operator's backends beside the authors' operations, a linear layer and a copy, taking turns."""
    from tostlm.bench.command import operator

    print(operator(shapes, _numbers(tokens, "--tokens"), dtypes, backends, repeats, threads or 1, out))


@bench_app.command("data")
def bench_data(
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="text, as `tostlm prepare` takes it")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer's file")],
    text_bytes: Annotated[int, typer.Option(min=1, help="of the text, repeated where it is shorter")] = 50_000_000,
    context: Annotated[int, typer.Option(min=1, help="tokens of the windows that are loaded")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 3,
    workers: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="a .json file to write too")] = None,
) -> None:
    """Preparing text beside the tokenizer's own speed, taking turns, and the loader's share of a step."""
    from tostlm.bench.command import data

    print(data(source, tokenizer, text_bytes, workers or 1, context, repeats, out))


@app.command()
def convert(
    checkpoint: CheckpointPath,
    to: Annotated[str, typer.Option(metavar="hf", help="the format: hf")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to write")],
) -> None:
    """Convert a checkpoint to a Hugging Face folder that computes the same logits."""
    from tostlm.checkpoint import load_checkpoint
    from tostlm.convert import export_hf

    if to != "hf":
        raise UserError(f"--to {to} is not known; use --to hf")
    export_hf(load_checkpoint(checkpoint), out)
    print(f"{out}: loads with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise UserError(f"{option} {text!r} must be whole numbers above 1 with commas between, as in 128,256,512")
    return sorted(set(numbers))


def _this_rank(
    arguments: list[str], nproc: int | None, check: Callable[[int], object] = lambda processes: None
) -> RankInfo:
    """This process's place in its run. Without a launcher it becomes one: `check`s the number of ranks and starts them.

    Raises:
        UserError: both a launcher and --nproc say how many ranks there are.
    """
    from tostlm.launch import export_rendezvous, rank_from_environment, run_local

    ranks = rank_from_environment(os.environ)
    if ranks is None:
        import torch

        processes = nproc or torch.cuda.device_count() or 1
        check(processes)
        raise typer.Exit(run_local(arguments, processes))
    if nproc is not None:
        raise UserError(
            f"--nproc {nproc} is for machines without a launcher; here one has started {ranks.world_size} ranks"
        )
    export_rendezvous(ranks)
    return ranks
