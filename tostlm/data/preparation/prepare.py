"""Text to token shards, one work unit at a time, so that an interruption loses unfinished units alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tostlm.data.preparation.merge import merge
from tostlm.data.preparation.plan import (
    RESULT,
    PreparationPlan,
    PreparationSettings,
    UnitResult,
    make_plan,
    read_plan,
    unfinished,
    unit_folder,
)
from tostlm.data.preparation.readers import Reader
from tostlm.data.preparation.selection import Document, Selector
from tostlm.data.preparation.workers import WorkDone, run_workers
from tostlm.data.shards import Manifest, SplitWriter
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import atomic_folder, locked, write_atomically

BATCH_CHARACTERS = 2_000_000  # text tokenized at once; two of them are in memory


class TaskShard(NamedTuple):
    """One of `task_count` tasks that share the work units: it does every `task_count`-th, from `task_index` on."""

    task_index: int
    task_count: int


def prepare(
    settings: PreparationSettings,
    tokenizer: Tokenizer,
    out: Path,
    *,
    workers: int | None = None,
    task: TaskShard | None = None,
    command: str = "",
) -> Manifest | None:
    """Tokenize every document of the sources into shards under `out`; the same call continues after an interruption.

    Args:
        settings: all that decides what the shards hold; the workers and tasks do not.
        workers: cores to use; None for all that this process may use.
        task: do only the work units of this task; `merge` makes the folder when all tasks are finished.
        command: recorded in the manifest.

    Returns:
        The manifest; None for a task.

    Raises:
        UserError: a source, a record or `out` cannot be used.
    """
    plan = make_plan(settings, tokenizer, out, command)
    units = [index for index in unfinished(out, plan) if task is None or index % task.task_count == task.task_index]
    run_workers(prepare_unit, out, plan, units, workers or len(os.sched_getaffinity(0)))
    return merge(out) if task is None else None


def prepare_unit(out: Path, index: int, threads: int, report: Callable[[WorkDone], None]) -> None:
    """Do one work unit of the plan in `out`, unless it is done; `report` gets what was done since its last call.

    Raises:
        UserError: a record cannot be used, or another process is doing this work unit.
    """
    plan = read_plan(out)
    folder = unit_folder(out, index)
    folder.parent.mkdir(exist_ok=True)
    busy = f"another tostlm prepare is doing work unit {index} of {out}; wait for it or end it"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        if not folder.exists():
            with atomic_folder(folder) as partial:
                result = _write_unit(plan, index, Tokenizer.from_folder(out), partial, threads, report)
                write_atomically(partial / RESULT, result.model_dump_json())


def _write_unit(
    plan: PreparationPlan,
    index: int,
    tokenizer: Tokenizer,
    folder: Path,
    threads: int,
    report: Callable[[WorkDone], None],
) -> UnitResult:
    settings = plan.settings
    writer = SplitWriter(folder, tokenizer, settings.heldout_fraction, settings.shard_tokens)
    selector = Selector(settings.selection)
    reader = Reader(plan.units[index], selector.columns, settings.selection.max_document_bytes)
    reported = 0
    for batch, encoded in _encoded(selector.documents(reader), tokenizer, threads):
        for document, tokens in zip(batch, encoded, strict=True):
            writer.add(tokens, document.data)
        report(
            WorkDone(
                source_bytes=reader.bytes_read - reported,
                documents=len(batch),
                tokens=sum(map(len, encoded)) + len(batch),
                text_bytes=sum(len(document.data) for document in batch),
            )
        )
        reported = reader.bytes_read
    report(WorkDone(source_bytes=(plan.units[index].bytes or 0) - reported))
    return UnitResult(
        tokenizer_sha256=tokenizer.sha256,
        dropped=dict(selector.dropped),
        examples=tuple(selector.examples),
        shards=writer.finish(),
    )


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[list[Document], Sequence[Sequence[int]]]]:
    """Yield batches of documents and their tokens; the next batch is read while one is tokenized on another thread."""
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


def parse_task(text: str) -> TaskShard:
    """Return the task that INDEX/COUNT names.

    Raises:
        UserError: the text is not of that form.
    """
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--task {text} must be INDEX/COUNT, the index from 0 to COUNT - 1, as in 0/8")
    return TaskShard(int(index), int(count))
