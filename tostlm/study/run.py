"""Running a study: workers take its runs one by one, train them, measure them and write the report.

Any number of workers, on any machines that share the study's folder, may run one study. A run belongs to the worker
that holds the lock in its folder, and is finished when its result exists; what a worker that died left unfinished, the
next one resumes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

from tostlm.config import dump_config
from tostlm.errors import EXIT_BUG, EXIT_REQUEUE, EXIT_USER_ERROR, UserError, report
from tostlm.files import locked, read_json_lines, require_writable, write_atomically
from tostlm.launch import run_local
from tostlm.launch.local import end_with_parent
from tostlm.study.measure import held_out_targets, measure, measure_task
from tostlm.study.plan import Cell, Study, cell_config, cells, distinct_cells, searched_by
from tostlm.study.report import write_report
from tostlm.study.results import Result, best_lr, read_result, require_same_settings, settings_of, write_result

POLL_SECONDS = 2.0  # between looks at what other workers have finished
CONFIG, LOCK, FAILED = "cell.yaml", ".study-lock", "failed"


def run_study(file: Path, study: Study, workers: int, processes: int) -> int:
    """Run what is unfinished of a study and return the exit code.

    Args:
        file: the study's file, which further workers read again.
        workers: runs at a time on this machine.
        processes: ranks of each run.

    Raises:
        UserError: finished runs had other settings, or the held-out text is not long enough.
    """
    require_same_settings(study)
    for cell in distinct_cells(study):
        if cell.kind == "final":
            held_out_targets(study, cell_config(study, cell, cell.lr))
    require_writable(study.study_dir)
    started = time.time()
    with contextlib.ExitStack() as at_exit:
        children = []
        if workers > 1:
            share = str(max(1, (os.cpu_count() or 1) // workers))
            os.environ.setdefault("OMP_NUM_THREADS", share)
            command = [sys.executable, "-m", "tostlm", "study", str(file), "--quiet", "--nproc", str(processes)]
            for _ in range(workers - 1):
                children.append(Popen(command, preexec_fn=end_with_parent))
                at_exit.callback(children[-1].terminate)
        code = _work(study, processes, started)
        if code > EXIT_USER_ERROR:  # asked to stop, or ranks were lost
            for child in children:
                child.terminate()
        codes = [code, *(child.wait() for child in children)]
    write_report(study)
    return max(codes)


def _work(study: Study, processes: int, started: float) -> int:
    """Run cells until none is left that this worker could run, and return the exit code."""
    worst = 0
    while pending := [cell for cell in cells(study) if not _ended(study, cell, started)]:
        for cell in pending:
            folder = study.study_dir / cell.name
            folder.mkdir(parents=True, exist_ok=True)
            if not _ready(study, cell):
                continue
            with _claimed(folder) as mine:
                if mine and not _ended(study, cell, started):
                    code = _run_cell(study, cell, processes)
                    worst = max(worst, code)
                    if code > EXIT_USER_ERROR:
                        return code  # asked to stop, or ranks were lost: the same command resumes
                    break
        else:
            if all(_hopeless(study, cell, started) for cell in pending):
                break
            time.sleep(POLL_SECONDS)
    return worst


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Yield whether this worker has the run to itself."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK, "another worker runs it"))
        except UserError:
            yield False
        else:
            yield True


def _ended(study: Study, cell: Cell, started: float) -> bool:
    """Return whether a run has its result, or has failed since this worker started."""
    folder = study.study_dir / cell.name
    if read_result(study, cell) is not None:
        return True
    with contextlib.suppress(FileNotFoundError):
        return (folder / FAILED).stat().st_mtime >= started
    return False


def _ready(study: Study, cell: Cell) -> bool:
    """Return whether the search for a run's learning rate is finished."""
    return cell.kind != "final" or all(read_result(study, other) is not None for other in searched_by(study, cell))


def _hopeless(study: Study, cell: Cell, started: float) -> bool:
    """Return whether a run waits for a search of which a run has failed."""
    return cell.kind == "final" and any(
        read_result(study, other) is None and _ended(study, other, started) for other in searched_by(study, cell)
    )


def _run_cell(study: Study, cell: Cell, processes: int) -> int:
    """Train and measure one run, and return its exit code."""
    folder = study.study_dir / cell.name
    if cell.kind == "task":
        print(f"\n== {cell.name}", flush=True)
        write_result(study, cell, measure_task(study, cell, cell_config(study, cell, None)))
        write_report(study)
        return 0
    lr = best_lr(study, cell)
    if study.search is not None and lr is None:
        return _fail(folder, f"{cell.name}: every learning rate of the search diverged", EXIT_USER_ERROR)
    config = cell_config(study, cell, lr)
    write_atomically(folder / CONFIG, dump_config(config))
    print(f"\n== {cell.name}, learning rate {config.optimizer.lr:g}", flush=True)
    received: list[int] = []
    code = run_local(["train", str(folder / CONFIG)], processes, received)
    if code == EXIT_USER_ERROR and cell.kind == "search" and _diverged(folder):
        write_result(study, cell, Result(config.optimizer.lr, settings_of(study, cell, config), loss=None))
    elif code in (EXIT_BUG, EXIT_USER_ERROR):
        return _fail(folder, f"{cell.name}: training failed with exit code {code}; its message is above", code)
    elif code:
        return code
    else:
        try:
            write_result(study, cell, measure(study, cell, config))
        except UserError as error:
            return _fail(folder, f"{cell.name}: {error}", EXIT_USER_ERROR)
    if cell.kind == "search":
        require_same_settings(study)
    write_report(study)
    return EXIT_REQUEUE if received else 0


def _diverged(folder: Path) -> bool:
    """Return whether a run that failed has had losses that were not finite, or was rolled back for others."""
    entries, _ = read_json_lines(folder / "metrics.jsonl")
    return any(entry.get("kind") == "event" or entry.get("loss", 0.0) is None for entry in entries)


def _fail(folder: Path, message: str, code: int) -> int:
    report(message)
    (folder / FAILED).write_text(message + "\n")
    return code


def study_progress(study: Study) -> str:
    """Return a table of a study's runs: finished, running, or waiting."""
    width = max(40, *(len(cell.name) + 2 for cell in cells(study)))
    rows = [f"{'run':<{width}}{'state':<12}{'learning rate':>14}{'loss':>9}"]
    for cell in cells(study):
        result, folder = read_result(study, cell), study.study_dir / cell.name
        lr, loss = (f"{cell.lr:g}" if cell.lr else ""), ""
        if result is not None:
            state = "diverged" if result.loss is None else "finished"
            lr, loss = f"{result.lr:g}", "" if result.loss is None else f"{result.loss:.4f}"
        elif folder.is_dir() and _is_held(folder):
            state = "running"
        elif (folder / FAILED).exists():
            state = "failed"
        else:
            state = "waiting"
        rows.append(f"{cell.name:<{width}}{state:<12}{lr:>14}{loss:>9}")
    return "\n".join(rows)


def _is_held(folder: Path) -> bool:
    try:
        with _claimed(folder) as mine:
            return not mine
    except OSError:  # nobody runs what nobody can write
        return False
