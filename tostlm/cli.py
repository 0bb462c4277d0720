"""The command line: a verb for each arrow of the data's way."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pydantic
import typer

from tostlm.errors import UserError

if TYPE_CHECKING:
    from tostlm.data import Manifest

Model = TypeVar("Model", bound=pydantic.BaseModel)

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

SOURCE_HELP = "file, folder, glob, package:NAME/GLOB or Hugging Face OWNER/NAME[:CONFIG][@SPLIT]; may be repeated"
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file, as in configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, as in optimizer.lr=3e-4")
]
MoreSources = Annotated[
    list[str] | None, typer.Argument(metavar="[SOURCE]...", help="more sources, as a shell's glob gives them")
]
Sources = Annotated[list[str], typer.Option("--source", help=SOURCE_HELP)]
TextColumn = Annotated[str, typer.Option(help="column that holds the text")]
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="a checkpoint, or a run's folder for its newest")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="threads; default: one a core")]


@app.command()
def quickstart(
    configs: Annotated[Path, typer.Option(help="folder with quickstart.yaml and quickstart-gpt2.yaml")] = Path(
        "configs"
    ),
    nproc: Annotated[int, typer.Option(min=1, help="training processes")] = 2,
) -> None:
    """The whole way on presidential speeches, for ToST and GPT-2; a second run goes on where the first ended."""
    from tostlm.quickstart import quickstart as run

    run(configs, nproc)


@app.command()
def config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a run's resolved config, its parameters, steps and tokens."""
    from tostlm.config import dump_config, load_config
    from tostlm.model import count_parameters

    run = load_config(config, overrides or [])
    print(dump_config(run))
    print(f"# parameters       {count_parameters(run.model):,} without position embeddings")
    print(f"# tokens per step  {run.train.batch_tokens:,}")
    print(f"# steps            {run.train.steps:,}")
    print(f"# total tokens     {run.tokens:,}")


@tokenizer_app.command("train")
def tokenizer_train(
    source: Sources,
    vocab_size: Annotated[int, typer.Option(min=260, max=1_000_000, help="pieces, the 256 bytes among them")],
    out: Annotated[Path, typer.Option(help="the .model file to write")],
    more: MoreSources = None,
    text_column: TextColumn = "text",
    sample_bytes: Annotated[
        int, typer.Option(min=1, help="train on a uniform sample of the documents, at most this much text")
    ] = 1_000_000_000,
    scan_bytes: Annotated[
        int | None, typer.Option(min=1, help="stop reading after this much text; default: read all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of the sample")] = 0,
) -> None:
    """Train a lossless SentencePiece BPE tokenizer."""
    from tostlm.data import Selection, documents, first_bytes, train_tokenizer
    from tostlm.files import require_file_writable

    require_file_writable(out)
    texts = documents([*source, *(more or [])], Selection(text_column=text_column))
    if scan_bytes is not None:
        texts = first_bytes(texts, scan_bytes)
    tokenizer = train_tokenizer(texts, vocab_size, out, sample_bytes, seed)
    print(f"{out}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}")


@tokenizer_app.command("import")
def tokenizer_import(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="a .model file, a tokenizer.json, a folder with one, or tiktoken's ranks of GPT-2"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the file to write")],
    end_token: Annotated[
        str | None, typer.Option(help="the token that ends documents; default: the one SOURCE names, or the usual")
    ] = None,
    allow_loss: Annotated[bool, typer.Option(help="take a tokenizer that changes some text")] = False,
) -> None:
    """Bring a tokenizer made elsewhere, SentencePiece's, Hugging Face's or GPT-2's, into the form tostlm uses."""
    from tostlm.data import import_tokenizer
    from tostlm.files import require_file_writable, write_atomically

    require_file_writable(out)
    tokenizer = import_tokenizer(source, end_token)
    loss = tokenizer.loss()
    if loss and not allow_loss:
        raise UserError(f"{source} loses text: {loss}; choose a lossless tokenizer, or accept that with --allow-loss")
    write_atomically(out, tokenizer.content)
    print(
        f"{out}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}, document end {tokenizer.end_piece}, "
        + (f"lossy: {loss}" if loss else "lossless")
    )


@app.command()
def prepare(
    out: Annotated[Path, typer.Option(help="the folder to write")],
    source: Annotated[list[str] | None, typer.Option("--source", help=SOURCE_HELP)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="the tokenizer's file")] = None,
    more: MoreSources = None,
    text_column: TextColumn = "text",
    id_column: Annotated[str | None, typer.Option(help="column that names documents in reports")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="keep documents where this holds, as language=en,de or score>=0.8; may be repeated"),
    ] = None,
    min_characters: Annotated[int, typer.Option(min=0, help="drop shorter documents")] = 1,
    max_characters: Annotated[int | None, typer.Option(min=1, help="drop longer documents")] = None,
    max_document_bytes: Annotated[
        int, typer.Option(min=1, help="a longer text is an error; memory is some 40 times this")
    ] = 16_000_000,
    on_error: Annotated[str, typer.Option(help="what a record that cannot be used does: fail or skip")] = "fail",
    dedup: Annotated[bool, typer.Option("--dedup", help="keep the first of documents with the same text")] = False,
    dedup_against: Annotated[
        list[Path] | None, typer.Option(help="drop documents that this prepared folder holds; may be repeated")
    ] = None,
    heldout_fraction: Annotated[float, typer.Option(help="share of the documents kept from training")] = 0.01,
    shard_tokens: Annotated[int, typer.Option(min=1, help="a new shard begins after this many tokens")] = 100_000_000,
    part_bytes: Annotated[int, typer.Option(min=1, help="size on disk of the parts the work is cut into")] = 1 << 28,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="cores to use; default: all")] = None,
    task: Annotated[str | None, typer.Option(help="do share INDEX/NUMBER of the parts, without merging")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="make a folder of the parts that tasks have finished")] = False,
) -> None:
    """Tokenize text into shards with a manifest and a held-out split; the same command goes on where it was ended."""
    from tostlm import data

    if merge:
        report(out, data.merge(out))
        return
    sources = [*(source or []), *(more or [])]
    if not sources or tokenizer is None:
        raise UserError("prepare needs --source and --tokenizer, or --merge for parts that are finished")
    selection = checked(
        data.Selection,
        text_column=text_column,
        id_column=id_column,
        keep=keep or [],
        min_characters=min_characters,
        max_characters=max_characters,
        max_document_bytes=max_document_bytes,
        on_error=on_error,
    )
    settings = checked(
        data.Settings,
        sources=sources,
        selection=selection,
        heldout_fraction=heldout_fraction,
        shard_tokens=shard_tokens,
        part_bytes=part_bytes,
        dedup=dedup,
        dedup_against=dedup_against or [],
    )
    manifest = data.prepare(
        settings,
        data.Tokenizer.load(tokenizer),
        out,
        workers=workers or cores(),
        task=data.parse_task(task) if task else None,
        command=shlex.join(["tostlm", *sys.argv[1:]]),
    )
    if manifest is not None:
        report(out, manifest)


def report(out: Path, manifest: Manifest) -> None:
    from tostlm.data import told

    for name, split in manifest.splits.items():
        print(f"{out}: {name} {split.tokens:,} tokens of {split.documents:,} documents, {split.text_bytes:,} bytes")
    if any(manifest.dropped.values()):
        print(f"{out}: dropped {told(manifest.dropped)}; {out}/dropped.jsonl names the first")


def checked(kind: type[Model], **values: Any) -> Model:
    """A settings object from options; what is wrong with them is a UserError."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise UserError(f"{option} {problem['input']!r}: {problem['msg'].lower()}") from None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="a folder made by `tostlm prepare`")]) -> None:
    """Compare every byte of prepared data with its manifest's checksums."""
    from tostlm.data import verify

    count = sum(1 for _ in verify(folder))
    print(f"{folder}: {count} files are whole")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine; default: one a GPU, or one")
    ] = None,
) -> None:
    """Train a run from its newest checkpoint, or from the start.

    Under torchrun or a Slurm step the ranks come from there; otherwise --nproc processes are started here.
    """
    from tostlm.config import batches, load_config
    from tostlm.launch import export_rendezvous, ranks_from_environment, run_local

    run = load_config(config, overrides or [])
    ranks = ranks_from_environment(os.environ)
    if ranks is None:
        import torch

        processes = nproc or torch.cuda.device_count() or 1
        batches(run, processes)
        raise typer.Exit(run_local(["train", str(config), *(overrides or [])], processes))
    if nproc is not None:
        raise UserError(f"--nproc {nproc} is for machines without a launcher; here one has started {ranks.world} ranks")
    export_rendezvous(ranks)
    if ranks.rank == 0:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("tostlm").setLevel(logging.INFO)
    from tostlm.train import train as train_run

    train_run(run, ranks)


@eval_app.command("perplexity")
def eval_perplexity(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="checkpoints or folders of runs")],
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "128,256,512,1024",
    data: Annotated[
        Path | None, typer.Option(help="prepared data; default: the first checkpoint's, of a blend the first")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="windows scored at each context")] = 64,
    out: Annotated[Path | None, typer.Option(help="folder for .json, .csv, .png; default: the first run's")] = None,
) -> None:
    """Perplexity on held-out documents at growing contexts, the same tokens scored at every one."""
    from tostlm.eval.command import perplexity

    print(perplexity(checkpoints, _numbers(contexts, "--contexts"), data, windows, out))


@app.command()
def generate(
    checkpoint: CheckpointPath,
    prompt: Annotated[str, typer.Option(help="text to go on from; default: the start of a document")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="choose among this many")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
) -> None:
    """Write text with a checkpoint."""
    from tostlm.eval.command import write_text

    print(write_text(checkpoint, prompt, tokens, temperature, top_k, seed))


@bench_app.command("train")
def bench_train(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="runs whose models are compared")],
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, with commas between")] = "512,2048,8192",
    tokens: Annotated[int, typer.Option(min=1, help="tokens a pass")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="timed passes of each model")] = 5,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="a .json file to write too")] = None,
) -> None:
    """Training tokens a second of several models, taking turns, at growing contexts."""
    from tostlm.bench.command import training

    print(training(configs, _numbers(contexts, "--contexts"), tokens, repeats, threads, out))


@bench_app.command("operator")
def bench_operator(
    shapes: Annotated[str, typer.Option(help="WIDTHxHEADS, with commas between")] = "768x12,1280x20",
    tokens: Annotated[str, typer.Option(help="tokens of a sequence, with commas between")] = "1024,4096,16384,65536",
    dtypes: Annotated[str, typer.Option(help="of fp32, bf16, fp16, with commas between")] = "fp32,bf16",
    backends: Annotated[str, typer.Option(help="of torch, cpp, triton; default: those that serve here")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 5,
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="write OUT.json, OUT.txt and OUT.png too")] = None,
) -> None:
    """The TSSA operator's backends beside the authors' operations, a linear layer and a copy, taking turns."""
    from tostlm.bench.command import operator

    print(operator(shapes, _numbers(tokens, "--tokens"), dtypes, backends, repeats, threads or 1, out))


@app.command()
def convert(
    checkpoint: CheckpointPath,
    to: Annotated[str, typer.Option(metavar="hf", help="the format: hf")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to write")],
) -> None:
    """Convert a checkpoint to a Hugging Face folder that computes the same logits."""
    from tostlm.checkpoint import load
    from tostlm.convert import export_hf

    if to != "hf":
        raise UserError(f"--to {to} is not known; use --to hf")
    export_hf(load(checkpoint), out)
    print(f"{out}: loads with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise UserError(f"{option} {text!r} must be whole numbers above 1 with commas between, as in 128,256,512")
    return sorted(set(numbers))
