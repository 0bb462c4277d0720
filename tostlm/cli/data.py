"""Subcommands from text to token shards: tokenizer, prepare, data."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import pydantic
import typer

from tostlm.cli.app import app, data_app, tokenizer_app
from tostlm.errors import UserError
from tostlm.files import require_file_writable, write_atomically

if TYPE_CHECKING:
    from tostlm.data import Manifest

Model = TypeVar("Model", bound=pydantic.BaseModel)

SOURCE_HELP = "file, folder, glob, package:NAME/GLOB or Hugging Face OWNER/NAME[:CONFIG][@SPLIT]; may be repeated"
MoreSources = Annotated[
    list[str] | None, typer.Argument(metavar="[SOURCE]...", help="more sources, as a shell's glob gives them")
]
Sources = Annotated[list[str], typer.Option("--source", help=SOURCE_HELP)]
TextColumn = Annotated[str, typer.Option(help="column that holds the text")]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="keep documents where this holds, as language=en,de or score>=0.8; may be repeated"),
]
MaxDocumentBytes = Annotated[int, typer.Option(min=1, help="a longer text is an error; memory is some 40 times this")]
MaxWindowBytes = Annotated[
    int, typer.Option(help="memory that a file's decompressor may ask for, as zstd --long=31 asks for 2147483648")
]
OnError = Annotated[str, typer.Option(help="on a record that cannot be used: fail or skip")]
HeldoutFraction = Annotated[float, typer.Option(help="share of the documents kept from training")]
ShardTokens = Annotated[int, typer.Option(min=1, help="a new shard begins after this many tokens")]


@tokenizer_app.command("train")
def tokenizer_train(
    source: Sources,
    vocab_size: Annotated[int, typer.Option(min=260, max=1_000_000, help="pieces, the 256 bytes among them")],
    out: Annotated[Path, typer.Option(help="the .model file to write")],
    more: MoreSources = None,
    text_column: TextColumn = "text",
    keep: Keep = None,
    max_document_bytes: MaxDocumentBytes = 16_000_000,
    max_window_bytes: MaxWindowBytes = 1 << 27,
    on_error: OnError = "fail",
    sample_bytes: Annotated[
        int, typer.Option(min=1, help="train on a uniform sample of the documents, at most this much text")
    ] = 1_000_000_000,
    scan_bytes: Annotated[
        int | None, typer.Option(min=1, help="stop reading after this much text; default: read all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of the sample")] = 0,
) -> None:
    """Train a lossless SentencePiece BPE tokenizer."""
    from tostlm.data import Selection, documents, format_counts, limit_bytes, train_tokenizer

    require_file_writable(out)
    selection = checked(
        Selection,
        text_column=text_column,
        keep=keep or [],
        max_document_bytes=max_document_bytes,
        max_window_bytes=max_window_bytes,
        on_error=on_error,
    )
    dropped: Counter[str] = Counter()
    texts = documents([*source, *(more or [])], selection, dropped)
    if scan_bytes is not None:
        texts = limit_bytes(texts, scan_bytes)
    tokenizer = train_tokenizer(texts, vocab_size, out, sample_bytes, seed)
    print(f"{out}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}")
    if dropped:
        print(f"{out}: dropped {format_counts(dropped)}")


@tokenizer_app.command("import")
def tokenizer_import(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="a .model file, a tokenizer.json, a folder with one, or tiktoken's ranks of GPT-2"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the file to write")],
    eos_token: Annotated[
        str | None,
        typer.Option(help="the end-of-document token; default: the one SOURCE names, else a common one it has"),
    ] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="accept a tokenizer that changes texts")] = False,
) -> None:
    """Import a tokenizer of SentencePiece, Hugging Face or GPT-2, so that it names its end-of-document token."""
    from tostlm.data import import_tokenizer

    require_file_writable(out)
    tokenizer = import_tokenizer(source, eos_token)
    lossy = tokenizer.find_lossy_text()
    if lossy and not allow_lossy:
        raise UserError(
            f"{source} loses text: {lossy}; choose a lossless tokenizer, or accept the loss with --allow-lossy"
        )
    write_atomically(out, tokenizer.content)
    print(
        f"{out}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}, end-of-document token "
        f"{tokenizer.eos_token}, {f'lossy: {lossy}' if lossy else 'lossless'}"
    )


@app.command()
def prepare(
    out: Annotated[Path, typer.Option(help="the folder to write")],
    source: Annotated[list[str] | None, typer.Option("--source", help=SOURCE_HELP)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="the tokenizer's file")] = None,
    more: MoreSources = None,
    text_column: TextColumn = "text",
    id_column: Annotated[str | None, typer.Option(help="column that names documents in reports")] = None,
    keep: Keep = None,
    min_characters: Annotated[int, typer.Option(min=0, help="drop shorter documents")] = 1,
    max_characters: Annotated[int | None, typer.Option(min=1, help="drop longer documents")] = None,
    max_document_bytes: MaxDocumentBytes = 16_000_000,
    max_window_bytes: MaxWindowBytes = 1 << 27,
    on_error: OnError = "fail",
    dedup: Annotated[bool, typer.Option("--dedup", help="keep the first of documents with the same text")] = False,
    dedup_against: Annotated[
        list[Path] | None, typer.Option(help="drop documents that this prepared folder holds; may be repeated")
    ] = None,
    heldout_fraction: HeldoutFraction = 0.01,
    shard_tokens: ShardTokens = 100_000_000,
    unit_bytes: Annotated[int, typer.Option(min=1, help="bytes on disk of a work unit")] = 1 << 28,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="take a tokenizer that changes some text")] = False,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="cores to use; default: all")] = None,
    task: Annotated[str | None, typer.Option(help="do share INDEX/COUNT of the work units, without merging")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="merge the work units that tasks have finished")] = False,
) -> None:
    """Tokenize text into shards with a manifest and a held-out split; the same command resumes it."""
    from tostlm import data

    if merge:
        report(out, data.merge(out))
        return
    sources = [*(source or []), *(more or [])]
    if not sources or tokenizer is None:
        raise UserError("prepare needs --source and --tokenizer, or --merge for work units that are finished")
    settings = checked(
        data.PreparationSettings,
        sources=sources,
        text_column=text_column,
        id_column=id_column,
        keep=keep or [],
        min_characters=min_characters,
        max_characters=max_characters,
        max_document_bytes=max_document_bytes,
        max_window_bytes=max_window_bytes,
        on_error=on_error,
        dedup=dedup,
        dedup_against=dedup_against or [],
        heldout_fraction=heldout_fraction,
        shard_tokens=shard_tokens,
        unit_bytes=unit_bytes,
        allow_lossy=allow_lossy,
    )
    manifest = data.prepare(
        settings,
        data.Tokenizer.load(tokenizer),
        out,
        workers=workers,
        task=data.parse_task(task) if task else None,
        command=this_command(),
    )
    if manifest is not None:
        report(out, manifest)


def report(out: Path, manifest: Manifest) -> None:
    from tostlm.data import format_counts

    for name, split in manifest.splits.items():
        print(f"{out}: {name} {split.tokens:,} tokens of {split.documents:,} documents, {split.text_bytes:,} bytes")
    if any(manifest.dropped.values()):
        print(f"{out}: dropped {format_counts(manifest.dropped)}; {out}/dropped.jsonl names the first")


def checked(kind: type[Model], **options: object) -> Model:
    """Return settings made of options; raise a UserError that names the option whose value is wrong."""
    try:
        return kind.model_validate(options)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise UserError(f"{option} {problem['input']!r}: {problem['msg'].lower()}") from None


def this_command() -> str:
    return shlex.join(["tostlm", *sys.argv[1:]])


@data_app.command("import")
def data_import(
    source: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="nanoGPT's .bin, or Megatron's prefix of .bin and .idx")
    ],
    kind: Annotated[str, typer.Option("--from", help="nanogpt or megatron")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer the ids are of; see `tostlm tokenizer import`")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    heldout: Annotated[
        list[Path] | None, typer.Option(help="a file of held-out documents, as nanoGPT's val.bin; may be repeated")
    ] = None,
    heldout_fraction: HeldoutFraction = 0.01,
    shard_tokens: ShardTokens = 100_000_000,
) -> None:
    """Make a prepared folder of token files of nanoGPT or Megatron-LM."""
    from tostlm.data import Tokenizer, import_tokens

    manifest = import_tokens(
        kind,
        source,
        heldout or [],
        Tokenizer.load(tokenizer),
        out,
        heldout_fraction=heldout_fraction,
        shard_tokens=shard_tokens,
        command=this_command(),
    )
    report(out, manifest)


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="a folder made by `tostlm prepare`")]) -> None:
    """Compare every byte of prepared data with its manifest's checksums."""
    from tostlm.data import verify

    count = sum(1 for _ in verify(folder))
    print(f"{folder}: {count} files match their checksums")


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(help="a folder made by `tostlm prepare`")],
    samples: Annotated[int, typer.Option(min=0, help="documents of each split to print the beginnings of")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="chooses the documents")] = 0,
    out: Annotated[Path | None, typer.Option(help="the .png to draw; default: lengths.png in the folder")] = None,
) -> None:
    """Describe prepared data: counts, lengths of documents, samples of the text."""
    from tostlm.data import show

    for paragraph in show(folder, samples, seed, out or folder / "lengths.png"):
        print(paragraph, end="\n\n", flush=True)
