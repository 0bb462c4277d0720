"""Subcommand plan: what a run will take, before it is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import ConfigFile, Overrides, app, parse_numbers
from tostlm.errors import EXIT_USER_ERROR


@app.command("plan")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="of nodes, with commas between to compare")] = "1",
    gpus_per_node: Annotated[int, typer.Option(min=1, max=1024, help="or processes, on CPUs")] = 8,
    device: Annotated[str, typer.Option(help="any other word lists those that are known")] = "h100-80gb",
    bench: Annotated[
        Path | None, typer.Option(help="what `tostlm bench train --out` measured there, in place of data sheets")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of an hour of one GPU")] = None,
    storage: Annotated[float, typer.Option(min=0.001, help="GB a second that checkpoints are written with")] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="all numbers as JSON")] = False,
) -> None:
    """Reckon a run's memory, step time, traffic, days and price; exit with 2 if it does not fit."""
    from tostlm.plan import plan_runs, report_plans

    counts = parse_numbers(nodes, "--nodes", least=1)
    plans = plan_runs(config, overrides or [], counts, gpus_per_node, device, bench, price, storage * 1e9)
    print(report_plans(config.stem, plans, json))
    if not all(each.fits for each in plans):
        raise typer.Exit(EXIT_USER_ERROR)
