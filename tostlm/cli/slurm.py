"""Subcommands for jobs on a Slurm cluster: submit ..."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tostlm.cli.app import ConfigFile, Overrides, parse_arguments, submit_app
from tostlm.errors import UserError

DEFAULT_SITE = Path("slurm/site.env")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder")]
Doctor = Annotated[bool, typer.Option("--doctor", help="check the nodes first; exclude those that fail")]

# What every subcommand that submits a job takes.
Nodes = Annotated[str, typer.Option(metavar="N|MIN-MAX", help="nodes; of a range, those free at each start")]
GpusPerNode = Annotated[int | None, typer.Option(min=0, help="GPUs of each node")]
CpusPerRank = Annotated[int | None, typer.Option(min=1, help="cores of a rank")]
TimeLimit = Annotated[str | None, typer.Option(metavar="D-HH:MM:SS", help="time limit of a job")]
Partition = Annotated[str | None, typer.Option(help="default, as for the next two: site.env's")]
SbatchOptions = Annotated[
    list[str] | None, typer.Option("--sbatch", metavar="NAME=VALUE", help="any other option of sbatch")
]
Site = Annotated[
    Path | None, typer.Option(help="the cluster's settings; default: TOSTLM_SITE, or slurm/site.env if it exists")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the script, and submit nothing")]


def _find_site(site: Path | None) -> Path | None:
    named = site or (Path(os.environ["TOSTLM_SITE"]) if "TOSTLM_SITE" in os.environ else None)
    if named is not None and not named.is_file():
        raise UserError(
            f"--site {named} does not exist; make it with `tostlm submit site-template > {named}` and fill it in"
        )
    return named or (DEFAULT_SITE if DEFAULT_SITE.is_file() else None)


@submit_app.command("pretrain")
def submit_pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="ranks on each node; default: one per GPU, or one")
    ] = None,
    chain: Annotated[int, typer.Option(min=1, help="jobs one after another, each with its time limit")] = 1,
    until_done: Annotated[bool, typer.Option("--until-done", help="each job queues the next")] = False,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=A,B,C", help="an array, a run per value")] = None,
    doctor: Doctor = False,
    warning_seconds: Annotated[
        int, typer.Option(min=10, help="how long before the time limit the run is asked to save and stop")
    ] = 120,
    nodes: Nodes = "1",
    gpus_per_node: GpusPerNode = None,
    cpus_per_rank: CpusPerRank = None,
    time: TimeLimit = None,
    partition: Partition = None,
    account: str | None = None,
    qos: str | None = None,
    sbatch: SbatchOptions = None,
    site: Site = None,
    dry_run: DryRun = False,
) -> None:
    """Train a run as a job that is started again until the run is finished."""
    from tostlm import slurm

    if chain > 1 and until_done:
        raise UserError(f"--chain {chain} and --until-done both say how the run continues; give one")
    gpus, ranks = gpus_per_node or 0, ranks_per_node or gpus_per_node or 1
    resources = slurm.Resources(nodes, gpus, ranks, cpus_per_rank, time, partition, account, qos, sbatch or ())
    policy = slurm.RestartPolicy(chain, until_done, doctor, warning_seconds)
    text = slurm.submit_pretrain(config, overrides or [], resources, policy, sweep or [], _find_site(site), dry_run)
    print(text)


def _add_task(kind: str, help_text: str, default_gpus: int) -> None:
    """Add the subcommand that submits another subcommand as a job."""

    @submit_app.command(kind, help=help_text, context_settings={"ignore_unknown_options": True})
    def submit(
        arguments: Annotated[
            list[str], typer.Argument(metavar="ARGUMENT...", help="the arguments of the subcommand itself")
        ],
        nodes: Nodes = "1",
        gpus_per_node: GpusPerNode = None,
        cpus_per_rank: CpusPerRank = None,
        time: TimeLimit = None,
        partition: Partition = None,
        account: str | None = None,
        qos: str | None = None,
        sbatch: SbatchOptions = None,
        site: Site = None,
        dry_run: DryRun = False,
    ) -> None:
        from tostlm import slurm

        gpus = default_gpus if gpus_per_node is None else gpus_per_node
        resources = slurm.Resources(nodes, gpus, 1, cpus_per_rank, time, partition, account, qos, sbatch or ())
        parsed = parse_arguments(slurm.TASK_COMMANDS[kind], arguments)
        print(slurm.submit_task(kind, arguments, parsed, resources, _find_site(site), dry_run))


_add_task("prepare", "Prepare text as an array of --nodes tasks, and merge what they made.", 0)
_add_task("eval", "Measure perplexity as a job: `tostlm eval perplexity`.", 1)
_add_task("bench", "Time models as a job: `tostlm bench train`.", 1)
_add_task("study", "Run a study as an array of --nodes tasks that divide its runs: `tostlm study`.", 0)
_add_task("convert", "Convert a checkpoint as a job: `tostlm convert`.", 0)


@submit_app.command()
def job(
    config: ConfigFile,
    overrides: Overrides = None,
    on_stop: Annotated[
        str, typer.Option(help="what follows when it was asked to stop: requeue, end or successor")
    ] = "requeue",
    doctor: Doctor = False,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="use as many nodes as the batch allows")] = None,
) -> None:
    """Run as the batch script of a pretraining job: start its ranks, and decide what follows them."""
    from tostlm import slurm

    if on_stop not in list(slurm.OnStop):
        raise UserError(f"--on-stop {on_stop} is not known; use {', '.join(slurm.OnStop)}")
    raise typer.Exit(slurm.run_job(config, overrides or [], slurm.OnStop(on_stop), doctor, ranks_per_node))


@submit_app.command()
def status(run: RunFolder) -> None:
    """Print the status of a run's jobs: state, step, speed, restarts, and why it failed."""
    from tostlm import slurm

    print(slurm.run_status(run))


@submit_app.command()
def cancel(
    run: RunFolder, now: Annotated[bool, typer.Option("--now", help="do not wait until it has saved")] = False
) -> None:
    """End a run's jobs for good."""
    from tostlm import slurm

    print(slurm.cancel_jobs(run, now))


@submit_app.command("site-template")
def site_template() -> None:
    """Print a site.env to fill in: the settings that differ from cluster to cluster."""
    from tostlm import slurm

    print((slurm.TEMPLATES / "site.env").read_text(), end="")
