"""Text to token shards, one work unit at a time, so that an interruption loses unfinished units alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TypeVar

from tostlm.data.preparation.merge import merge
from tostlm.data.preparation.plan import (
    RESULT,
    PreparationSettings,
    UnitResult,
    finished,
    make_plan,
    read_plan,
    unfinished,
    unit_folder,
)
from tostlm.data.preparation.progress import ProgressBar, WorkDone
from tostlm.data.preparation.readers import Reader
from tostlm.data.preparation.selection import Selector
from tostlm.data.preparation.sources import FileState
from tostlm.data.shards import Manifest, SplitWriter
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import atomic_folder, locked, write_atomically

BATCH_SIZE = 2_000_000  # characters of text tokenized at once; two batches are in memory
BATCH_DOCUMENTS = 8192  # at most, since a document takes memory beside its characters

SizedT = TypeVar("SizedT", bound=Sized)


def prepare(
    settings: PreparationSettings,
    tokenizer: Tokenizer,
    out: Path,
    *,
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    command: str = "",
) -> Manifest | None:
    """Tokenize every document of the sources into shards under `out`; the same call continues after an interruption.

    Args:
        settings: all that decides what the shards hold; the workers and tasks do not.
        workers: cores to use; None for all that this process may use. Several work units are done by a process each,
            which share the cores; a single one by threads of this process.
        task: index and count; do every count-th work unit from the index on, and leave `merge` for when all tasks are
            finished.
        command: recorded in the manifest.

    Returns:
        The manifest; None for a task.

    Raises:
        UserError: a source, a record or `out` cannot be used, or a worker was killed. Finished units stay.
    """
    if finished(settings, tokenizer, out):
        print(f"{out} is finished, with these settings")
        manifest = merge(out)  # clears what a kill left
        return manifest if task is None else None
    plan = make_plan(settings, tokenizer, out, command)
    first, step = task or (0, 1)
    units = [unit for unit in unfinished(out, plan) if unit % step == first]
    cores = workers or len(os.sched_getaffinity(0))
    processes = min(cores, len(units))
    progress = ProgressBar([plan.units[unit].bytes for unit in units])
    try:
        if processes > 1:
            _run_processes(out, units, processes, cores // processes, progress)
        else:
            for unit in units:
                prepare_unit(out, unit, cores, progress.add)
    finally:
        progress.close()
    return merge(out) if task is None else None


def _run_processes(out: Path, units: Sequence[int], processes: int, threads: int, progress: ProgressBar) -> None:
    """Have processes do work units; when one fails, the others are ended."""
    context = multiprocessing.get_context("spawn")
    jobs: Queue[int | None] = context.Queue()  # work units, and None for each process at the end
    reports: Queue[WorkDone | Exception | None] = context.Queue()  # None from a process that has ended
    for job in [*units, *[None] * processes]:
        jobs.put(job)
    started = [context.Process(target=_work, args=(out, threads, jobs, reports), daemon=True) for _ in range(processes)]
    try:
        for process in started:
            process.start()
        working = processes
        while working:
            try:
                report = reports.get(timeout=1)
            except queue.Empty:
                killed = [process.exitcode for process in started if process.exitcode]
                if killed:
                    raise UserError(
                        f"a worker ended with code {killed[0]} (-9: killed, mostly for lack of memory); run the "
                        "command again, with fewer --workers if need be: it continues from what is finished"
                    ) from None
                continue
            if isinstance(report, WorkDone):
                progress.add(report)
            elif report is None:
                working -= 1
            else:
                raise report
    finally:
        for process in started:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(out: Path, threads: int, jobs: Queue[int | None], reports: Queue[WorkDone | Exception | None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    try:
        while (unit := jobs.get()) is not None:
            prepare_unit(out, unit, threads, reports.put)
        reports.put(None)
    except Exception as error:
        reports.put(error)


def prepare_unit(out: Path, index: int, threads: int, report: Callable[[WorkDone], None]) -> None:
    """Do one work unit of the plan in `out`, unless it is done; `report` gets what was done since its last call.

    Raises:
        UserError: a record cannot be used, or another process is doing this work unit.
    """
    folder = unit_folder(out, index)
    folder.parent.mkdir(exist_ok=True)
    busy = f"another tostlm prepare is doing work unit {index} of {out}; wait for it or end it"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        if not folder.exists():
            with atomic_folder(folder) as partial:
                result = _write_unit(out, index, partial, threads, report)
                write_atomically(partial / RESULT, result.model_dump_json())


def _write_unit(out: Path, index: int, folder: Path, threads: int, report: Callable[[WorkDone], None]) -> UnitResult:
    plan, tokenizer = read_plan(out), Tokenizer.from_folder(out)
    unit, settings = plan.units[index], plan.settings
    writer = SplitWriter(folder, tokenizer, settings.heldout_fraction, settings.shard_tokens)
    selector = Selector(settings)
    reader = Reader(unit, selector.columns, settings.max_document_bytes, settings.max_window_bytes)
    before = {file: FileState.of(file) for file in unit.files}
    reported = 0
    for texts, encoded in _encoded(selector.documents(reader), tokenizer, threads):
        data = [text.encode() for text in texts]
        writer.add(encoded, data)
        report(
            WorkDone(
                source_bytes=reader.bytes_read - reported,
                documents=len(texts),
                tokens=sum(map(len, encoded)) + len(texts),
                text_bytes=sum(map(len, data)),
            )
        )
        reported = reader.bytes_read
    report(WorkDone(source_bytes=(unit.bytes or 0) - reported))
    shards = writer.finish()
    for file, state in before.items():
        if FileState.of(file) != state:
            raise UserError(f"{file} changed while it was read; run the same command again when it is finished")
    if not read_plan(out).is_same(plan):
        raise UserError(f"another tostlm prepare began {out} again, with other settings; wait for it or end it")
    return UnitResult(
        tokenizer_sha256=tokenizer.sha256,
        files=before,
        dropped=selector.dropped,
        examples=selector.examples,
        shards=shards,
    )


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, threads: int) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Yield batches of texts and their tokens; the next batch is read while one is tokenized on another thread."""
    with ThreadPoolExecutor(1) as pool:
        read = itertools.chain(batches(texts), [[]])  # so that the last batch has one after it
        futures = ((batch, pool.submit(tokenizer.encode_batch, batch, threads)) for batch in read)
        for (batch, future), _ in itertools.pairwise(futures):
            yield batch, future.result()


def batches(documents: Iterable[SizedT]) -> Iterator[list[SizedT]]:
    """Yield documents in lists that are small in memory, whatever the documents' lengths in characters or tokens."""
    batch: list[SizedT] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_SIZE or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parse_task(text: str) -> tuple[int, int]:
    """Return the index and the count of a task that is given as INDEX/COUNT.

    Raises:
        UserError: the text is not of that form.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count:
        raise UserError(f"--task {text} must be INDEX/COUNT, the index from 0 to COUNT - 1, as in 0/8")
    return index, count
