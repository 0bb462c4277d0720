"""Subcommands for checkpoints: checkpoint average and ema, convert."""

from __future__ import annotations

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
