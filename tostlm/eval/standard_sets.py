"""Standard sets (LAMBADA, BLiMP, WikiText, HellaSwag, ...) through EleutherAI's lm-eval, as published numbers are."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tostlm.errors import UserError, error_summary
from tostlm.eval.models import model_names
from tostlm.eval.token_scores import PASS_TOKENS
from tostlm.files import require_writable, write_atomically

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from tostlm.eval.harness import HarnessLM

# What is kept of lm-eval's results: no single answers, and nothing about the machine.
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "config")


class TaskSettings(NamedTuple):
    """What is measured, and how models are read."""

    tasks: Sequence[str]  # names of lm-eval's tasks, groups and tags, or patterns as blimp_*
    include_path: Path | None = None  # a folder of more tasks, which replace lm-eval's of the same names
    limit: int | None = None  # of each task so many documents, its first ones; None for all
    num_fewshot: int | None = None  # solved examples before each question; None is each task's own number
    device: str | None = None  # None is the GPU if there is one
    dtype: str | None = None  # of the weights; None is as saved
    batch_tokens: int = PASS_TOKENS  # that a forward pass reads


def evaluate_tasks(paths: Sequence[Path], settings: TaskSettings, out: Path | None) -> Iterator[str]:
    """Measure checkpoints on tasks of lm-eval, write harness.json, and yield lm-eval's table of each when it is done.

    Args:
        paths: checkpoints, or folders of runs for their newest ones.
        out: folder of harness.json; None: the first run's folder.

    Raises:
        UserError: lm-eval is missing, does not know a task or cannot load its data, or a checkpoint cannot be loaded.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "standard sets are measured by lm-eval, which is not installed; `pip install 'tostlm[harness]'`"
        )
    from tostlm.eval.harness import HarnessLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task relies on
    models = [HarnessLM(path, settings.device, settings.dtype, settings.batch_tokens) for path in paths]
    out = out or models[0].model.folder
    require_writable(out)
    manager, tasks = _load_tasks(settings)
    found: list[dict[str, object]] = []
    for name, model in zip(model_names([model.model for model in models]), models, strict=True):
        results = _measure(model, manager, tasks, settings)
        about = {"name": name, "checkpoint": str(model.model.path), "step": model.model.step}
        found.append(about | {key: results[key] for key in KEPT if key in results})
        _write(found, settings, out)
        yield f"{name}: {model.model.path}\n{_tables(results)}"
    yield f"written to {out}/harness.json"


def _load_tasks(settings: TaskSettings) -> tuple[TaskManager, list[str]]:
    """Return lm-eval's tasks and the names of those that are measured, whose data are there."""
    folder = settings.include_path
    if folder is not None and not any(folder.glob("**/*.yaml")):
        raise UserError(f"--include-path {folder} is no folder with tasks of lm-eval, which are .yaml files")
    manager = _open_manager(folder, settings.tasks)
    tasks = []
    for name in settings.tasks:
        matching = manager.match_tasks([name])
        if not matching:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none"
            raise UserError(f"lm-eval knows no task {name} (similar: {near}); `lm_eval ls tasks` lists what it knows")
        tasks += [task for task in matching if task not in tasks]
    _require_loadable(manager, tasks)
    return manager, tasks


def _open_manager(folder: Path | None, names: Sequence[str]) -> TaskManager:
    """Return the tasks of a folder, and lm-eval's own, 14,000 files, unless the folder has all that are named."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if not own.all_groups and all(own.match_tasks([name]) for name in names):  # groups may hold lm-eval's tasks
            return own
    return TaskManager(include_path=folder)


def _require_loadable(manager: TaskManager, tasks: list[str]) -> None:
    """Check that the data of tasks are there, and that they ask a model for text and nothing else.

    Raises:
        UserError: they are not, or they do not.
    """
    try:
        loaded = manager.load(tasks)["tasks"]
    except Exception as error:  # of the hub's client, of `datasets`, and of the tasks' own code
        remedy = "check the task's file; data on this machine can be named in one of your own (--include-path)"
        raise UserError(f"lm-eval cannot load {', '.join(tasks)}: {error_summary(error)}; {remedy}") from None
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"{name} runs code that a model writes, or shows it more than text; leave it out of --tasks"
            )


def _measure(model: HarnessLM, manager: TaskManager, tasks: list[str], settings: TaskSettings) -> Mapping[str, Any]:
    import lm_eval

    results: Mapping[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        log_samples=False,
    )
    return results


def _tables(results: Mapping[str, Any]) -> str:
    from lm_eval.utils import make_table

    columns = [column for column in ("results", "groups") if results.get(column)]
    return "\n".join(str(make_table(results, column)) for column in columns)


def _write(models: Sequence[Mapping[str, object]], settings: TaskSettings, out: Path) -> None:
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    about = {key: settings._asdict()[key] for key in ("limit", "num_fewshot", "dtype")}
    content = {"lm_eval": lm_eval.__version__, **about, "models": models}
    write_atomically(out / "harness.json", json.dumps(content, indent=2, default=handle_non_serializable) + "\n")
