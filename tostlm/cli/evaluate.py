"""Subcommands of evaluation: eval perplexity, recall, layers, harness and report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tostlm.cli.app import CheckpointPath, eval_app, join_or_launch, parse_numbers
from tostlm.errors import UserError

if TYPE_CHECKING:
    from tostlm.eval import EvalSettings

Models = Annotated[
    list[Path], typer.Argument(metavar="MODEL...", help="checkpoints, folders of runs, or Hugging Face folders")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU if there is one")]
Dtype = Annotated[str | None, typer.Option(help="of the weights: fp32, bf16 or fp16; default: as saved")]
BatchTokens = Annotated[int, typer.Option(min=1, help="tokens that a forward pass reads")]
ClampPositions = Annotated[
    bool, typer.Option("--clamp-positions", help="read beyond learned positions, where every token has the last one")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the code that a Hugging Face folder brings")
]


def _reading(
    contexts: str, device: str | None, dtype: str | None, batch_tokens: int, trust_code: bool, clamp: bool
) -> EvalSettings:
    """Return how models are read, as the options of several subcommands say."""
    from tostlm.device import parse_device, parse_dtype
    from tostlm.eval import EvalSettings

    return EvalSettings(
        parse_numbers(contexts, "--contexts"),
        device=None if device is None else parse_device(device),
        trust_code=trust_code,
        dtype=None if dtype is None else parse_dtype(dtype),
        pass_tokens=batch_tokens,
        clamp=clamp,
    )


@eval_app.command("perplexity")
def eval_perplexity(
    models: Models,
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "128,256,512,1024",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="prepared data, once or more; default: the first checkpoint's, of a blend the first folder"),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="same-targets, windows or stream: which tokens are scored (docs/evaluation.md)")
    ] = "same-targets",
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="windows scored at each context; default: enough for an error of 1%, or all"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for .json, .csv, .png; default: the first run's")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 8192,
    trust_remote_code: TrustRemoteCode = False,
    clamp_positions: ClampPositions = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine that share the text; default: one")
    ] = None,
) -> None:
    """Measure perplexity on held-out documents at growing contexts; the same tokens are scored at every one.

    Under torchrun or in a Slurm step of several tasks, these share the text. The same command continues what was
    interrupted.
    """
    from tostlm.eval import ALONE, PROTOCOLS, evaluate_perplexity
    from tostlm.launch import rank_from_environment

    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol} is not known; it is one of {', '.join(PROTOCOLS)}")
    reading = _reading(contexts, device, dtype, batch_tokens, trust_remote_code, clamp_positions)
    settings = reading._replace(protocol=protocol, windows=windows)
    options = {
        "contexts": contexts,
        "protocol": protocol,
        "windows": windows,
        "out": out,
        "device": device,
        "dtype": dtype,
        "batch-tokens": batch_tokens,
    }
    arguments = ["eval", "perplexity", *map(str, models)]
    arguments += ["--trust-remote-code"] * trust_remote_code + ["--clamp-positions"] * clamp_positions
    arguments += [part for folder in data or [] for part in ("--data", str(folder))]
    arguments += [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
    ranks = ALONE if nproc is None and rank_from_environment(os.environ) is None else join_or_launch(arguments, nproc)
    text = evaluate_perplexity(models, data or [], settings, out, ranks)
    if not ranks.rank:
        print(text)


@eval_app.command("recall")
def eval_recall(
    models: Models,
    contexts: Annotated[str, typer.Option(help="lengths in tokens, with commas between")] = "256,1k,4k",
    pairs: Annotated[str, typer.Option(help="pairs of a key and a value to recall, with commas between")] = "4,16,64",
    data: Annotated[
        Path | None, typer.Option(help="prepared data whose held-out text stands between; default: the first run's")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="read at each length and load")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="of the sequences")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for recall.json; default: the first run's")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 8192,
    trust_remote_code: TrustRemoteCode = False,
    clamp_positions: ClampPositions = False,
) -> None:
    """Measure what models bring back from their context: pairs, a repeat, a needle in text, a chain's statistics."""
    from tostlm.eval import measure_recall

    settings = _reading(contexts, device, dtype, batch_tokens, trust_remote_code, clamp_positions)
    loads = parse_numbers(pairs, "--pairs")
    print(measure_recall(models, [data] if data else [], settings, loads, sequences, seed, out))


@eval_app.command("layers")
def eval_layers(
    checkpoint: CheckpointPath,
    contexts: Annotated[str, typer.Option(help="bounds of positions in tokens, with commas between")] = "64,256,1k,4k",
    data: Annotated[Path | None, typer.Option(help="prepared data; default: the run's, of a blend the first")] = None,
    documents: Annotated[int, typer.Option(min=1, help="held-out documents that are read")] = 16,
    out: Annotated[Path | None, typer.Option(help="folder for layers.json; default: the run's")] = None,
    device: Device = None,
) -> None:
    """Show what each layer does by position: entropy of memberships, gates, how far its heads remember."""
    from tostlm.device import parse_device
    from tostlm.eval.layers import measure_layers

    bounds = parse_numbers(contexts, "--contexts")
    print(measure_layers(checkpoint, data, bounds, documents, out, None if device is None else parse_device(device)))


@eval_app.command("harness")
def eval_harness(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="checkpoints, or folders of runs")],
    tasks: Annotated[str, typer.Option(help="tasks of lm-eval, with commas between, as lambada_openai,blimp")],
    include_path: Annotated[Path | None, typer.Option(help="a folder of more tasks, as lm-eval's .yaml files")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="documents of each task; default: all")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="solved examples before a question; default: each task's own number")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for harness.json; default: the first run's")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Measure standard sets (LAMBADA, BLiMP, WikiText, ...) with EleutherAI's lm-eval, and print its tables."""
    from tostlm.eval.standard_sets import TaskSettings, evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {tasks!r} names none; `lm_eval ls tasks` lists what there is")
    settings = TaskSettings(names, include_path, limit, num_fewshot, device, dtype, batch_tokens)
    for text in evaluate_tasks(models, settings, out):
        print(text, flush=True)


@eval_app.command("report")
def eval_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, or checkpoints in them")],
    out: Annotated[Path | None, typer.Option(help="folder to write; default: the first run's")] = None,
    decode: Annotated[Path | None, typer.Option(help="a file that `tostlm bench decode --out` wrote")] = None,
    title: Annotated[str | None, typer.Option(help="of the page; default: the names of the runs")] = None,
) -> None:
    """Write a page, report.html, of what training and evaluations left in the folders of runs, and report.md.

    Nothing is measured: a section whose numbers are missing says which command finds them.
    """
    from tostlm.eval.page import write_page

    print(f"written to {write_page(runs, out, decode, title)}, report.md and report-*.png beside it")
