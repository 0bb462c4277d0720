"""Subcommands for checkpoints: checkpoint average and ema, convert."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import CheckpointPath, app, checkpoint_app
from tostlm.errors import UserError


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


SIZE = re.compile(r"(\d+)(MB|GB)")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="a checkpoint, a run's folder, a Hugging Face folder of GPT-2 or of an export, or a ckpt.pt of the "
            "ToST release or nanoGPT",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="hf|release|tostlm",
            help="the format: a folder for transformers; the ToST release's ckpt.pt; a checkpoint of weights alone",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to write")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="the tokenizer of a source that has none beside it, as a ckpt.pt")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that was converted before")] = False,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="with hf: of a file of weights, as 500MB; default: 4GB")
    ] = None,
    own_class: Annotated[
        bool, typer.Option("--own-class", help="with hf: tostlm's class also where GPT-2's could hold the model")
    ] = False,
) -> None:
    """Convert a model, and publish it if it computes the same logits.

    Nothing that a source holds is executed.
    """
    from tostlm.convert.conversion import FORMATS
    from tostlm.convert.conversion import convert as write_converted

    if to not in FORMATS:
        raise UserError(f"--to {to} is not known; use {', '.join(FORMATS)}")
    options = {"shard_bytes": _parse_size(shard_size), "own_class": own_class or None}
    given = {name: value for name, value in options.items() if value is not None}
    if given and to != "hf":
        raise UserError(f"--{'shard-size' if shard_size else 'own-class'} goes with --to hf, and this is --to {to}")
    from tostlm.checkpoint import load_checkpoint

    loaded = load_checkpoint(source, tokenizer=tokenizer)
    for comparison in write_converted(loaded, out, functools.partial(FORMATS[to], **given), overwrite):
        print(comparison)
    print(f"{out}: {_advice(to, out)}")


def _parse_size(text: str | None) -> int | None:
    if text is None:
        return None
    found = SIZE.fullmatch(text)
    if found is None or not int(found[1]):
        raise UserError(f"--shard-size {text!r} must be a whole number of MB or GB, as in 500MB")
    return int(found[1]) << {"MB": 20, "GB": 30}[found[2]]


def _advice(to: str, out: Path) -> str:
    return {
        "hf": f"loads with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)",
        "release": f"the release's sample.py loads it with --out_dir={out}",
        "tostlm": f"a checkpoint; train it on with `tostlm train {out / 'config.yaml'} data.path=... run_dir=... "
        f"--from {out}`",
    }[to]
