"""Verbs for jobs on a Slurm cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tostlm.cli.app import ConfigFile, Overrides, app
from tostlm.errors import UserError

if TYPE_CHECKING:
    from tostlm.slurm import Resources

submit_app = typer.Typer(help="Jobs on a Slurm cluster.", no_args_is_help=True)
app.add_typer(submit_app, name="submit")

SITE = Path("slurm/site.env")

Nodes = Annotated[str, typer.Option(metavar="N|MIN-MAX", help="nodes; of a range as many as there are at each start")]
Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs of each node")]
RanksPerNode = Annotated[int | None, typer.Option(min=1, help="ranks on each node; default: one a GPU, or one")]
Cpus = Annotated[int | None, typer.Option(min=1, help="cores of a rank")]
Time = Annotated[str | None, typer.Option(metavar="D-HH:MM:SS", help="time limit of a job")]
Partition = Annotated[str | None, typer.Option(help="default, as of the next two: what site.env says")]
Account = Annotated[str | None, typer.Option()]
Qos = Annotated[str | None, typer.Option()]
More = Annotated[list[str] | None, typer.Option("--sbatch", metavar="NAME=VALUE", help="any other option of sbatch")]
Site = Annotated[
    Path | None, typer.Option(help="the cluster's settings; default: TOSTLM_SITE, or slurm/site.env where that is")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the script, and submit nothing")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder")]


@submit_app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = "1",
    gpus_per_node: Gpus = 0,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: Cpus = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: More = None,
    site: Site = None,
    chain: Annotated[int, typer.Option(min=1, help="jobs one after another, each with its time limit")] = 1,
    until_done: Annotated[bool, typer.Option("--until-done", help="each job queues the next")] = False,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=A,B,C", help="an array, a run for each value")] = None,
    doctor: Annotated[bool, typer.Option("--doctor", help="check the nodes first; leave those out that fail")] = False,
    warning_seconds: Annotated[int, typer.Option(min=10, help="to save in, before the time limit")] = 120,
    dry_run: DryRun = False,
) -> None:
    """Train a run as a job that is started again until the run is finished."""
    from tostlm import slurm

    resources = _resources(nodes, gpus_per_node, ranks_per_node, cpus_per_rank, time, partition, account, qos, sbatch)
    if chain > 1 and until_done:
        raise UserError(f"--chain {chain} and --until-done both say how the run goes on; give one")
    course = slurm.RestartPolicy(chain, until_done, doctor, warning_seconds)
    print(slurm.pretrain(config, overrides or [], resources, course, sweep or [], _site(site), dry_run))


def _task(kind: str, help_text: str, default_gpus: int) -> None:
    """Add the verb that submits another verb."""

    @submit_app.command(kind, help=help_text, context_settings={"ignore_unknown_options": True})
    def submit(
        arguments: Annotated[list[str], typer.Argument(metavar="ARGUMENT...", help="those of the verb itself")],
        nodes: Nodes = "1",
        gpus_per_node: Gpus = default_gpus,
        cpus_per_rank: Cpus = None,
        time: Time = None,
        partition: Partition = None,
        account: Account = None,
        qos: Qos = None,
        sbatch: More = None,
        site: Site = None,
        dry_run: DryRun = False,
    ) -> None:
        from tostlm import slurm

        resources = _resources(nodes, gpus_per_node, 1, cpus_per_rank, time, partition, account, qos, sbatch)
        print(slurm.submit_task(kind, arguments, resources, _site(site), dry_run))


_task("prepare", "Prepare text as an array of --nodes tasks, and merge their parts.", 0)
_task("eval", "Measure perplexity as a job: `tostlm eval perplexity`.", 1)
_task("bench", "Time models as a job: `tostlm bench train`.", 1)
_task("convert", "Convert a checkpoint as a job: `tostlm convert`.", 0)


@submit_app.command()
def job(
    config: ConfigFile,
    overrides: Overrides = None,
    then: Annotated[str, typer.Option(help="once it was asked to stop: requeue, end or successor")] = "requeue",
    doctor: Annotated[bool, typer.Option("--doctor", help="check the nodes first; leave those out that fail")] = False,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="take as many nodes as the batch allows")] = None,
) -> None:
    """Be the batch script of a pretraining job: start its ranks, and see to what comes after."""
    from tostlm import slurm

    if then not in list(slurm.OnStop):
        raise UserError(f"--then {then} is not known; use {', '.join(slurm.OnStop)}")
    raise typer.Exit(slurm.run_job(config, overrides or [], slurm.OnStop(then), doctor, ranks_per_node))


@submit_app.command()
def status(run: RunFolder) -> None:
    """What became of a run's jobs: state, step, speed, restarts, and why it failed."""
    from tostlm import slurm

    print(slurm.status(run))


@submit_app.command()
def cancel(
    run: RunFolder, now: Annotated[bool, typer.Option("--now", help="do not wait until it has saved")] = False
) -> None:
    """End a run's jobs for good."""
    from tostlm import slurm

    print(slurm.cancel(run, now))


def _resources(
    nodes: str,
    gpus_per_node: int | None,
    ranks_per_node: int | None,
    cpus_per_rank: int | None,
    time: str | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    more: list[str] | None,
) -> Resources:
    from tostlm.slurm import Resources

    ranks = ranks_per_node or gpus_per_node or 1
    return Resources(nodes, gpus_per_node or 0, ranks, cpus_per_rank, time, partition, account, qos, tuple(more or ()))


def _site(site: Path | None) -> Path | None:
    named = site or (Path(os.environ["TOSTLM_SITE"]) if "TOSTLM_SITE" in os.environ else None)
    if named is not None and not named.is_file():
        raise UserError(f"--site {named} does not exist; copy slurm/site.env and fill it in")
    return named or (SITE if SITE.is_file() else None)
