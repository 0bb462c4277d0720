"""Subcommands for runs: quickstart, config, train, doctor."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import ConfigFile, Overrides, app, config_app, join_or_launch
from tostlm.errors import UserError

Processes = Annotated[int | None, typer.Option(min=1, help="processes on this machine; default: one per GPU, or one")]


@app.command()
def quickstart(
    configs: Annotated[
        Path | None,
        typer.Option(help="folder with quickstart.yaml and quickstart-gpt2.yaml; default: the shipped ones"),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="training processes")] = 2,
) -> None:
    """Run the whole pipeline on presidential speeches, for ToST and GPT-2. A second run continues the first."""
    from tostlm.quickstart import quickstart as run

    run(configs, nproc)


@config_app.command("list")
def config_list() -> None:
    """List the shipped configs; every CONFIG argument takes their names."""
    from tostlm.config import load_config, shipped_configs
    from tostlm.model import count_parameters

    for config in shipped_configs():
        parameters = count_parameters(load_config(config.path).model)
        size = f"{parameters / 1e6:.0f}M" if parameters >= 10e6 else f"{parameters / 1e6:.1f}M"
        print(f"{config.name:<18}{size:>6}  {config.summary}")


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a run's resolved config, its parameters, state, steps and tokens."""
    from tostlm.config import dump_config, load_config
    from tostlm.model import count_parameters, state_bytes

    run = load_config(config, overrides or [])
    print(dump_config(run))
    print(f"# parameters       {count_parameters(run.model):,} without position embeddings")
    context = run.data.context_tokens
    print(f"# state            {state_bytes(run.model, context):,} bytes a sequence of {context:,} tokens")
    ends = [*(f" to step {stage.first_step:,}" for stage in run.stages[1:]), ""]
    batches = (f"{stage.batch_tokens:,}{end}" for stage, end in zip(run.stages, ends, strict=True))
    print(f"# tokens per step  {', '.join(batches)}")
    print(f"# steps            {run.train.steps:,}")
    print(f"# total tokens     {run.tokens:,}")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    branch_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="a checkpoint of another run that this one begins from: train.branch_from",
        ),
    ] = None,
) -> None:
    """Train a run from its newest checkpoint, or from the start.

    Under torchrun or a Slurm step the ranks come from there; otherwise --nproc processes are started here.
    """
    from tostlm.config import batch_plan, load_config

    if branch_from == "":
        raise UserError("--from is empty; name a checkpoint of another run, or leave it out")
    # As JSON, since a folder may be named as what YAML reads as something else.
    keys = [*(overrides or []), *([] if branch_from is None else [f"train.branch_from={json.dumps(branch_from)}"])]
    run = load_config(config, keys)

    def check(ranks: int) -> None:
        batch_plan(run, ranks)
        if run.train.branch_from is not None:
            from tostlm.checkpoint.branch import find_origin

            find_origin(run)

    rank = join_or_launch(["train", str(config), *keys], nproc, check)
    if rank.rank == 0:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("tostlm").setLevel(logging.INFO)
    from tostlm.train import train as train_run

    train_run(run, rank)


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    timeout_seconds: Annotated[
        float, typer.Option(min=1, help="a rank that does not answer within this time is unhealthy")
    ] = 120,
    out: Annotated[Path | None, typer.Option(help="a .json file to write too; it names the hosts to exclude")] = None,
) -> None:
    """Check on all ranks what would spoil a run before it starts: software, devices, network, clocks, disk, data.

    The ranks are started as those of `tostlm train` are.
    """
    from tostlm.config import load_config

    run = load_config(config, overrides or [])
    options = ["--timeout-seconds", str(timeout_seconds), *(["--out", str(out)] if out else [])]
    rank = join_or_launch(["doctor", str(config), *(overrides or []), *options], nproc)
    from tostlm.doctor import run_doctor

    run_doctor(run, rank, timeout_seconds, out)
