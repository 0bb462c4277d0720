"""Text to token shards, part by part: what is finished stays, whoever is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tostlm.data.preparation.merge import merge
from tostlm.data.preparation.plan import (
    PART,
    FinishedPart,
    PreparationPlan,
    PreparationSettings,
    make_plan,
    part_folder,
    read_plan,
    unfinished,
)
from tostlm.data.preparation.readers import Reader
from tostlm.data.preparation.selection import Document, Selector
from tostlm.data.preparation.workers import WorkDone, run_workers
from tostlm.data.shards import TRAIN, VALIDATION, Manifest, ShardWriter, content_hash, dtype_for
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import locked, write_atomically

BATCH_CHARACTERS = 2_000_000  # text tokenized at once; two of them are in memory


class TaskShard(NamedTuple):
    """Which of the parts are this call's, of `stride` calls that share them: the first and every stride-th after it."""

    first: int
    stride: int


def prepare(
    settings: PreparationSettings,
    tokenizer: Tokenizer,
    out: Path,
    *,
    workers: int = os.cpu_count() or 1,
    task: TaskShard | None = None,
    command: str = "",
) -> Manifest | None:
    """Tokenize every document of the sources into shards under `out`; the manifest comes last.

    The same call goes on after an interruption. What is written depends on the settings alone, whatever the workers
    and tasks. With a `task` only its parts are done, and `merge` ends the work.

    Raises:
        UserError: a source, a record or `out` cannot be used.
    """
    plan = make_plan(settings, tokenizer, out, command)
    mine = [index for index in unfinished(out, plan) if task is None or index % task.stride == task.first]
    run_workers(prepare_part, out, plan, mine, workers)
    return merge(out) if task is None else None


def prepare_part(out: Path, index: int, threads: int, say: Callable[[WorkDone], None]) -> None:
    """Do one part of the plan in `out`, unless it is done; `say` is told what was read and written since it was last.

    Raises:
        UserError: a record cannot be used, or another process is at this part.
    """
    plan = read_plan(out)
    final = part_folder(out, index)
    partial = final.with_name(f".{final.name}.partial")
    final.parent.mkdir(exist_ok=True)
    busy = f"another tostlm prepare is at part {index} of {out}; wait for it or end it"
    with locked(final.with_name(f".{final.name}.lock"), busy):
        if final.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            part = _write_part(plan, index, Tokenizer.from_folder(out), partial, threads, say)
            write_atomically(partial / PART, part.model_dump_json())
            partial.replace(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_part(
    plan: PreparationPlan, index: int, tokenizer: Tokenizer, folder: Path, threads: int, say: Callable[[WorkDone], None]
) -> FinishedPart:
    settings = plan.settings
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype, settings.shard_tokens) for split in (TRAIN, VALIDATION)}
    selector = Selector(settings.selection)
    reader = Reader(plan.parts[index], selector.columns, settings.selection.max_document_bytes)
    said = 0
    for batch, encoded in _encoded(selector.documents(reader), tokenizer, threads):
        for document, tokens in zip(batch, encoded, strict=True):
            known_by = content_hash(document.data)
            split = VALIDATION if is_heldout(known_by, settings.heldout_fraction) else TRAIN
            writers[split].add([*tokens, tokenizer.eos_id], known_by, len(document.data))
        say(
            WorkDone(
                source_bytes=reader.bytes_read - said,
                documents=len(batch),
                tokens=sum(map(len, encoded)) + len(batch),
                text_bytes=sum(len(document.data) for document in batch),
            )
        )
        said = reader.bytes_read
    say(WorkDone(source_bytes=(plan.parts[index].bytes or 0) - said))
    return FinishedPart(
        tokenizer_sha256=tokenizer.sha256,
        dropped=dict(selector.dropped),
        examples=tuple(selector.examples),
        shards={split: writer.finish() for split, writer in writers.items()},
    )


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[list[Document], Sequence[Sequence[int]]]]:
    """Batches of documents and their tokens; the next batch is read while one is tokenized, which needs no Python."""
    with ThreadPoolExecutor(1) as pool:
        before: tuple[list[Document], Future[list[list[int]]]] | None = None
        for batch in _batches(documents):
            future = pool.submit(tokenizer.encode_batch, [document.text for document in batch], threads)
            if before is not None:
                yield before[0], before[1].result()
            before = batch, future
        if before is not None:
            yield before[0], before[1].result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def is_heldout(content_hash: bytes, heldout_fraction: float) -> bool:
    """The side of a document, by its content alone: its hash, read as a number in [0, 1)."""
    return int.from_bytes(content_hash[:8], "big") / 2**64 < heldout_fraction


def parse_task(text: str) -> TaskShard:
    """INDEX/NUMBER as a task.

    Raises:
        UserError: it is not of that form.
    """
    index, _, number = text.partition("/")
    if not (index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise UserError(f"--task {text} must be INDEX/NUMBER, the index from 0 to NUMBER - 1, as in 0/8")
    return TaskShard(int(index), int(number))
