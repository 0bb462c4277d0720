"""Subcommands for benchmarks: bench train, bench decode, bench mixers, bench operator, bench loop, bench loss, bench
data, bench report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import ConfigFile, Overrides, bench_app, join_or_launch, parse_numbers
from tostlm.errors import UserError

Configs = Annotated[
    list[Path], typer.Argument(metavar="CONFIG...", help="runs whose models are compared, as files or shipped names")
]
Out = Annotated[Path | None, typer.Option(help="a .json file to write too")]
THREADS = typer.Option(min=1, max=1024, help="threads; default: one per core")


@bench_app.command("train")
def bench_train(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="configs, as files or shipped names; transformers:CONFIG for its GPT-2 of that shape; folders of "
            "Hugging Face's",
        ),
    ],
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "512,2048,8192",
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a step")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="timed steps of each model")] = 5,
    threads: Annotated[int | None, THREADS] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="compile the models")] = False,
    out: Out = None,
) -> None:
    """Time training steps of several models, interleaved, at growing contexts: tokens per second, and memory."""
    from tostlm.bench import report_training

    print(report_training(models, parse_numbers(contexts, "--contexts"), tokens, repeats, threads, compiled, out))


@bench_app.command("decode")
def bench_decode(
    configs: Configs,
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "1k,2k,8k",
    tokens: Annotated[int, typer.Option(min=1, help="tokens written after each context")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="sequences that are written together")] = 1,
    threads: Annotated[int | None, THREADS] = None,
    out: Out = None,
) -> None:
    """Time a token of several models, interleaved, after growing contexts, and the memory that a context takes."""
    from tostlm.bench import report_decoding

    print(report_decoding(configs, parse_numbers(contexts, "--contexts"), tokens, batch, threads, out))


@bench_app.command("mixers")
def bench_mixers(
    mixers: Annotated[
        str, typer.Option(help="with commas between")
    ] = "tssa,tssa_cross,tssa_delta,gated_delta,window,softmax",
    shape: Annotated[str, typer.Option(help="WIDTHxHEADS")] = "768x12",
    tokens: Annotated[str, typer.Option(help="tokens of a sequence, with commas between")] = "1024,4096,16384",
    repeats: Annotated[int, typer.Option(min=1, help="timed passes of each")] = 5,
    threads: Annotated[int, THREADS] = 1,
    out: Out = None,
) -> None:
    """Time a layer of each mixer beside a linear layer, interleaved."""
    from tostlm.bench import report_mixers

    width, heads = _parse_shape(shape, "--shape")
    print(report_mixers(mixers.split(","), width, heads, parse_numbers(tokens, "--tokens"), repeats, threads, out))


@bench_app.command("operator")
def bench_operator(
    shapes: Annotated[str, typer.Option(help="WIDTHxHEADS, with commas between")] = "768x12,1280x20",
    tokens: Annotated[str, typer.Option(help="tokens of a sequence, with commas between")] = "1024,4096,16384,65536",
    dtypes: Annotated[str, typer.Option(help="of fp32, bf16, fp16, with commas between")] = "fp32,bf16",
    backends: Annotated[str, typer.Option(help="of torch, cpp, triton; default: those that run here")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 5,
    threads: Annotated[int, THREADS] = 1,
    out: Annotated[Path | None, typer.Option(help="write OUT.json, OUT.txt and OUT.png too")] = None,
) -> None:
    """Time the TSSA operator's backends beside the authors' operations, a linear layer and a copy, interleaved."""
    from tostlm.bench import report_operator
    from tostlm.bench.operator import DTYPES, Shape

    chosen = set(dtypes.split(","))
    if unknown := chosen - set(DTYPES):
        raise UserError(f"--dtypes {unknown.pop()} is not known; use {', '.join(DTYPES)}")
    sizes, lengths = [_parse_shape(shape, "--shapes") for shape in shapes.split(",")], parse_numbers(tokens, "--tokens")
    cases = [Shape(*size, length, kind) for size in sizes for kind in DTYPES if kind in chosen for length in lengths]
    try:
        print(report_operator(cases, backends.split(",") if backends else [], repeats, threads, out))
    except ValueError as error:
        raise UserError(str(error)) from None


@bench_app.command("loss")
def bench_loss(
    width: Annotated[int, typer.Option(min=1, help="channels of a token")] = 768,
    vocab_size: Annotated[int, typer.Option(min=1, help="rows of the vocabulary")] = 50_304,
    tokens: Annotated[str, typer.Option(help="tokens of a pass, with commas between")] = "1024,8192",
    dtypes: Annotated[str, typer.Option(help="of fp32 and bf16, with commas between")] = "fp32,bf16",
    repeats: Annotated[int, typer.Option(min=1, help="timed passes of each")] = 3,
    threads: Annotated[int, THREADS] = 1,
    out: Out = None,
) -> None:
    """Time the loss and its gradients beside the three matrix products in them, interleaved."""
    from tostlm.bench import report_loss

    lengths = parse_numbers(tokens, "--tokens")
    print(report_loss(width, vocab_size, lengths, dtypes.split(","), repeats, threads, out))


@bench_app.command("loop")
def bench_loop(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="processes; default: one per GPU, or one")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed steps of each")] = 10,
    threads: Annotated[int, THREADS] = 1,
    out: Out = None,
) -> None:
    """Time the training loop's steps beside those of a bare loop of PyTorch's, interleaved, on a run's data."""
    from tostlm.config import batch_plan, load_config

    run = load_config(config, overrides or [])
    options = ["--repeats", str(repeats), "--threads", str(threads), *(["--out", str(out)] if out else [])]
    command = ["bench", "loop", str(config), *(overrides or []), *options]
    rank = join_or_launch(command, nproc, lambda ranks: batch_plan(run, ranks))
    from tostlm.bench.loop import report_loop

    if (text := report_loop(run, rank, repeats, threads, out)) is not None:
        print(text)


@bench_app.command("data")
def bench_data(
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="text, as `tostlm prepare` takes it")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer's file")],
    text_bytes: Annotated[
        int, typer.Option(min=1, help="how much of the text to use; it is repeated where it is shorter")
    ] = 50_000_000,
    document_characters: Annotated[
        int | None, typer.Option(min=1, help="cut the text into documents of this length, to time short documents")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens of the windows that are loaded")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 3,
    workers: Annotated[int, THREADS] = 1,
    out: Out = None,
) -> None:
    """Time preparation beside the tokenizer alone, interleaved, and the loader's share of a training step."""
    from tostlm.bench import report_data
    from tostlm.data import Tokenizer

    print(
        report_data(source, Tokenizer.load(tokenizer), text_bytes, document_characters, workers, context, repeats, out)
    )


@bench_app.command("report")
def bench_report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="of `tostlm bench train --out FILE`")],
    out: Annotated[Path, typer.Option(help="the page, a .md file; its plots lie beside it")],
) -> None:
    """Write a page on training benchmarks: exponents of time and memory in the context, and who overtakes whom."""
    from tostlm.bench import report_scaling

    print(report_scaling(files, out), end="")


def _parse_shape(shape: str, option: str) -> tuple[int, int]:
    """Return width and heads of WIDTHxHEADS; a UserError names `option` if it is none, or the heads do not divide."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", shape)
    width, heads = map(int, match.groups()) if match else (0, 0)
    if not heads or width % heads:
        raise UserError(f"{option} {shape} must be WIDTHxHEADS, the heads dividing the width, as in 768x12")
    return width, heads
