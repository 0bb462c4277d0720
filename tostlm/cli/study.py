"""The subcommand study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import app


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="the study's YAML file")],
    workers: Annotated[int, typer.Option(min=1, help="runs at a time on this machine")] = 1,
    nproc: Annotated[int, typer.Option(min=1, help="processes of each run")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="without the table at the end")] = False,
    status: Annotated[bool, typer.Option("--status", help="print what is finished, and run nothing")] = False,
) -> None:
    """Train several models on the same tokens, each at its best learning rate, over seeds, and compare them.

    The same command resumes it; given on several machines that share the study's folder, it divides the runs.
    """
    from tostlm.study import load_study, run_study, study_progress

    plan = load_study(file)
    if not status and (code := run_study(file, plan, workers, nproc)):
        raise typer.Exit(code)
    if not quiet:
        print(f"\n{study_progress(plan)}\n\n{plan.study_dir}/report.md, report.json, loss-by-*.png")
