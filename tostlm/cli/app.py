"""The tree of subcommands, and the arguments that several of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tostlm.errors import UserError

if TYPE_CHECKING:
    from tostlm.launch import RankInfo

HELP = """Pretrain language models whose token mixer is linear in the context.

\b
text -> tokenizer -> token shards -> training -> checkpoint -> perplexity, text, Hugging Face
        tokenizer    prepare         train                     eval        generate  convert

`tostlm quickstart` runs all of these once on a small corpus.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Run configs: the shipped ones, and what a config resolves to.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Prepared data.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Checkpoints.", no_args_is_help=True)
eval_app = typer.Typer(help="Evaluation of checkpoints.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks, each side by side with what it is compared with.", no_args_is_help=True)
submit_app = typer.Typer(help="Jobs on a Slurm cluster.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(submit_app, name="submit")

UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20}

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="the run's YAML file, or the name of a shipped config (`tostlm config list`)"
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, as in optimizer.lr=3e-4")
]
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest one")
]


def parse_arguments(command: str, arguments: list[str]) -> dict[str, Any]:
    """Return what a subcommand, as "eval perplexity", takes arguments for, by the names of its parameters.

    What it would refuse ends this command as it would end that one.
    """
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    with found.make_context(f"tostlm {command}", list(arguments)) as context:
        return dict(context.params)


def parse_numbers(text: str, option: str, least: int = 2) -> list[int]:
    """Return the distinct whole numbers of a comma-separated list, ascending; a UserError names `option` otherwise.

    None may be below `least`.

    A number may end in k or M, for 1,024 or 1,048,576 times as many.
    """
    try:
        numbers = [int(part.rstrip("kM")) * UNITS[part[len(part.rstrip("kM")) :]] for part in text.split(",")]
    except (ValueError, KeyError):
        numbers = []
    if not numbers or min(numbers) < least:
        raise UserError(
            f"{option} {text!r} must be whole numbers above {least - 1} with commas between, as in 128,512,4k,1M"
        )
    return sorted(set(numbers))


def join_or_launch(
    arguments: list[str], nproc: int | None, check: Callable[[int], object] = lambda ranks: None
) -> RankInfo:
    """Return the rank that a launcher gave this process; without a launcher, start the ranks here and exit with them.

    Args:
        arguments: the command line of each rank that is started here.
        check: called with the number of ranks before they are started.

    Raises:
        UserError: both a launcher and --nproc say how many ranks there are.
    """
    from tostlm.launch import export_rendezvous, rank_from_environment, run_local

    rank = rank_from_environment(os.environ)
    if rank is None:
        import torch

        processes = nproc or torch.cuda.device_count() or 1
        check(processes)
        raise typer.Exit(run_local(arguments, processes))
    if nproc is not None:
        raise UserError(
            f"--nproc {nproc} is for machines without a launcher; here one has started {rank.world_size} ranks"
        )
    export_rendezvous(rank)
    return rank
