"""The commands' tree, and the arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Pretrain language models whose token mixer is linear in the context.

\b
text -> tokenizer -> token shards -> training -> checkpoint -> perplexity, text, Hugging Face
        tokenizer    prepare         train                     eval        generate  convert

`tostlm quickstart` goes the whole way once.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Prepared data.", no_args_is_help=True)
eval_app = typer.Typer(help="What a checkpoint is worth.", no_args_is_help=True)
bench_app = typer.Typer(help="How fast models are, side by side.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file, as in configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, as in optimizer.lr=3e-4")
]
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="threads; default: one a core")]
