"""Subcommands for checkpoints: checkpoint list, show, verify, diff, prune, average, merge and ema, and convert."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import CheckpointPath, app, checkpoint_app
from tostlm.errors import UserError

ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="a checkpoint, a run's folder, a Hugging Face folder of GPT-2 or of an export, a ckpt.pt of the ToST "
        "release or nanoGPT, or a folder of DeepSpeed's checkpoints with the model's config.json",
    ),
]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="the tokenizer of a source that has none beside it, as a ckpt.pt")
]


@checkpoint_app.command("list")
def checkpoint_list(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    as_json: Annotated[bool, typer.Option("--json", help="write a JSON object a line")] = False,
) -> None:
    """List a run's checkpoints: tokens, validation loss, size, and which is the latest and the best."""
    from tostlm.checkpoint.describe import list_checkpoints, table

    rows = list_checkpoints(run)
    print("\n".join(json.dumps(row._asdict()) for row in rows) if as_json else table(rows))


@checkpoint_app.command("show")
def checkpoint_show(source: ModelPath, tokenizer: TokenizerPath = None) -> None:
    """Describe a checkpoint, or a model of another format: its shape, tokenizer, training and files."""
    from tostlm.checkpoint.describe import describe

    print(describe(source, tokenizer))


@checkpoint_app.command("verify")
def checkpoint_verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="a checkpoint, or a run's folder for all of its checkpoints")
    ],
) -> None:
    """Compare every byte of a checkpoint, or of all of a run's, with its checksums."""
    from tostlm.checkpoint import checkpoints, resolve
    from tostlm.checkpoint.integrity import find_damage

    damaged = []
    found = checkpoints(checkpoint) or [resolve(checkpoint)]
    for path in found:
        damage = find_damage(path)
        print(f"{path}: {damage or 'whole'}", flush=True)
        damaged += [path] if damage else []
    if damaged:
        raise UserError(f"{len(damaged)} of {len(found)} checkpoints are damaged; runs resume from whole ones")


@checkpoint_app.command("diff")
def checkpoint_diff(
    first: ModelPath,
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="another")],
    lines: Annotated[int, typer.Option(min=1, help="lines to print at most")] = 40,
) -> None:
    """Say what tells two checkpoints apart: config, progress, tokenizer, and by how much weights differ."""
    from tostlm.checkpoint.describe import differences

    found = differences(first, second)
    print("\n".join(found[:lines]) if found else "nothing differs")
    if len(found) > lines:
        print(f"and {len(found) - lines:,} more; --lines {len(found)} prints all")


@checkpoint_app.command("prune")
def checkpoint_prune(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run that is not training")],
    keep_last: Annotated[int, typer.Option(min=1, help="how many of the newest to keep")],
    keep_every: Annotated[int | None, typer.Option(min=1, help="keep those of multiples of this step too")] = None,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="keep that of the lowest validation loss too")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be deleted, and delete nothing")] = False,
) -> None:
    """Delete a run's older checkpoints, as train.keep_last_checkpoints and the like do while it trains."""
    from tostlm.checkpoint.folders import prune_run

    for path in prune_run(run, keep_last, keep_every, keep_best, dry_run):
        print(f"{path}: {'would be deleted' if dry_run else 'deleted'}")


@checkpoint_app.command("merge")
def checkpoint_merge(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="checkpoints, or folders of runs")],
    shares: Annotated[str, typer.Option(help="a number for each that add up to 1, with commas between, as 0.7,0.3")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
) -> None:
    """Write a weighted mean of the weights of several checkpoints of one model."""
    from tostlm.checkpoint import resolve
    from tostlm.checkpoint.average import average

    try:
        numbers = [float(share) for share in shares.split(",")]
    except ValueError:
        raise UserError(f"--shares {shares!r} must be numbers with commas between, as in 0.7,0.3") from None
    sources = [resolve(path) for path in checkpoints]
    average(sources, out, numbers)
    print(f"{out}: {' + '.join(f'{number:g} {source}' for number, source in zip(numbers, sources, strict=True))}")


@checkpoint_app.command("average")
def checkpoint_average(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="checkpoints or folders of runs")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    last: Annotated[int, typer.Option(min=1, help="how many of its newest the folder of a run stands for")] = 1,
) -> None:
    """Write the mean of the weights of several checkpoints of one model, to evaluate, generate from and convert."""
    from tostlm.checkpoint.average import average, newest_checkpoints

    sources = [found for path in checkpoints for found in newest_checkpoints(path, last)]
    average(sources, out)
    print(f"{out}: the mean of {', '.join(map(str, sources))}")


@checkpoint_app.command("ema")
def checkpoint_ema(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="the folder to write")],
) -> None:
    """Write the moving average of a checkpoint's weights (train.ema_decay), to evaluate, generate from and convert."""
    from tostlm.checkpoint import resolve
    from tostlm.checkpoint.average import extract_ema

    found = resolve(checkpoint)
    extract_ema(found, out)
    print(f"{out}: the moving average that {found} has")


SIZE = re.compile(r"([0-9]+)(MB|GB)")


@app.command()
def convert(
    source: ModelPath,
    to: Annotated[
        str,
        typer.Option(
            metavar="hf|tostlm|release|deepspeed|torch-export|onnx|int8",
            help="the format: a folder for transformers; a checkpoint of weights alone; the ToST release's ckpt.pt; a "
            "folder for transformers with AdamW's state as a universal checkpoint of DeepSpeed's; programs of "
            "torch.export; ONNX; a folder for transformers with weights in int8",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to write")],
    tokenizer: TokenizerPath = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that was converted before")] = False,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="with hf: of a file of weights, as 500MB; default: 4GB")
    ] = None,
    own_class: Annotated[
        bool, typer.Option("--own-class", help="with hf: tostlm's class also where GPT-2's could hold the model")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="with hf, int8: of the model, for its card, as apache-2.0; default: unknown")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="with int8: prepared data to measure by; default: the run's")
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(min=2, max=1 << 20, help="with torch-export: of a prompt that are read at a time; default: 64"),
    ] = None,
) -> None:
    """Convert a model, and publish it if it computes the same logits.

    Nothing that a source holds is executed.
    """
    from tostlm.convert.conversion import FORMATS
    from tostlm.convert.conversion import convert as write_converted

    if to not in FORMATS:
        raise UserError(f"--to {to} is not known; use {', '.join(FORMATS)}")
    options = {
        "shard_bytes": ("--shard-size", _parse_size(shard_size)),
        "own_class": ("--own-class", own_class or None),
        "license": ("--license", _checked_license(license)),
        "data": ("--data", data),
        "prefill_tokens": ("--prefill-tokens", prefill_tokens),
    }
    given = {name: value for name, (_, value) in options.items() if value is not None}
    for name in given.keys() - FORMATS[to].options:
        takers = [other for other, format in FORMATS.items() if name in format.options]
        raise UserError(f"{options[name][0]} goes with --to {' or '.join(takers)}, and this is --to {to}")
    from tostlm.checkpoint import load_checkpoint

    loaded = load_checkpoint(source, tokenizer=tokenizer)
    for comparison in write_converted(loaded, out, functools.partial(FORMATS[to].write, **given), overwrite):
        print(comparison)
    print(f"{out}: {FORMATS[to].advice.format(out=out)}")


def _checked_license(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", name):
        raise UserError(f"--license {name!r} must be an identifier, as apache-2.0 or mit")
    return name


def _parse_size(text: str | None) -> int | None:
    if text is None:
        return None
    found = SIZE.fullmatch(text)
    if found is None or not int(found[1]):
        raise UserError(f"--shard-size {text!r} must be a whole number of MB or GB, as in 500MB")
    return int(found[1]) << {"MB": 20, "GB": 30}[found[2]]
