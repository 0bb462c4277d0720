"""What a study is: its file, and the runs that follow from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import NonNegativeInt

from tostlm.config import (
    FOLDER,
    PositiveInt,
    RunConfig,
    Strict,
    load_config,
    read_mapping,
    validate_mapping,
)
from tostlm.errors import UserError
from tostlm.model import count_body_parameters
from tostlm.study.tasks import NOT_EMPTY, LearningRates, Task

Keys = dict[str, Any]  # dotted keys of a run's config, and their values
# Of an arm or a size, which is also that of a folder, beside the report's files.
NAME = re.compile(r"(?!report\.|loss-by-)[A-Za-z0-9][A-Za-z0-9_.+-]*")
Context = Annotated[int, pydantic.Field(ge=2)]  # tokens, of which the last is predicted
NOTHING: Any = pydantic.Field(default_factory=dict)
TOLERANCE = 0.01  # of the parameters of an arm beside the reference's


class Arm(Strict):
    """One of the models that are compared."""

    set: Keys = NOTHING  # its keys of the run's config
    seeds: Annotated[tuple[NonNegativeInt, ...], NOT_EMPTY] | None = None  # None: the study's
    steps: PositiveInt | None = None  # of its final runs; None: the base's
    lrs: LearningRates | None = None  # of its search, or its only one; None: the study's


class Search(Strict):
    """The search for each arm's learning rate: short runs of one seed, of which the lowest validation loss counts."""

    lrs: LearningRates
    steps: PositiveInt
    seed: NonNegativeInt = 0


class Evaluation(Strict):
    """What is measured of every final run, on held-out tokens."""

    data: Path | None = None  # a prepared folder; None: the run's own
    contexts: Annotated[tuple[Context, ...], NOT_EMPTY]  # the same tokens are scored at each, in tokens
    windows: PositiveInt = 64  # scored at each context


class Study(Strict):
    """A study's file. Every arm runs at every size, first to find its learning rate, then once for each seed."""

    study_dir: Path  # of its runs and its report
    base: Path  # the config that all runs start from: a file beside this one, or as commands take it
    set: Keys = NOTHING  # keys of all runs
    # Keys of the runs of a size, by the size's name.
    sizes: Annotated[dict[str, Keys], NOT_EMPTY] = pydantic.Field(default={"": {}})
    arms: dict[str, Arm]
    reference: str  # the arm that others are compared with
    match_parameters: bool = True  # make every arm as large as the reference, by the width of its MLP
    seeds: tuple[NonNegativeInt, ...] = ()  # none where the tasks or the search are all that is asked
    search: Search | None = None  # None: all arms train at the base's rate, or their own
    evaluation: Evaluation | None = None  # goes with seeds
    tasks: dict[str, Task] = NOTHING  # synthetic ones, for which every arm is trained anew
    task_set: Keys = NOTHING  # keys of the models that are trained for them

    @pydantic.model_validator(mode="after")
    def _names(self) -> Study:
        named_sizes = () if self.sizes.keys() == {""} else self.sizes
        for name in (*self.arms, *named_sizes, *self.tasks):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} must be letters, digits, and -, _, . or + within, as it names a folder, and not begin "
                    "like a report's file"
                )
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is not one of the arms, {', '.join(self.arms)}")
        for arm in self.arms.values():
            if (arm.seeds or self.seeds) and self.evaluation is None:
                raise ValueError("seeds go with evaluation: {contexts: [...]}, which their runs are measured by")
            if self.search is None and arm.lrs is not None:
                raise ValueError("lrs of an arm go with search; set its optimizer.lr without one")
        if self.search is None and not self.tasks and not any(arm.seeds or self.seeds for arm in self.arms.values()):
            raise ValueError("nothing to run: it has neither seeds, tasks nor search")
        return self

    @property
    def contexts(self) -> tuple[int, ...]:
        """The context lengths in tokens that final runs are scored at."""
        return self.evaluation.contexts if self.evaluation is not None else ()


class Cell(NamedTuple):
    """One run of a study."""

    kind: Literal["search", "final", "task"]
    size: str
    arm: str
    seed: int
    lr: float | None  # None: the best of the search, or without any the config's; of a task, each of the task's
    task: str = ""

    @property
    def name(self) -> str:
        """Its folder in the study's."""
        names = {"search": f"search-lr{self.lr:g}" if self.lr else "", "task": f"task-{self.task}"}
        last = names.get(self.kind, f"seed{self.seed}")
        return "/".join(part for part in (self.size, self.arm, last) if part)


def load_study(path: Path) -> Study:
    """Read a study's YAML file, or a shipped study by its name, and check the config of every run that it asks for.

    Its `base` is a file beside it, or else one as commands take it.

    Raises:
        UserError: the file, a key or a value is wrong, or arms cannot be made as large as the reference.
    """
    if not path.exists() and (shipped := FOLDER / "studies" / f"{path}.yaml").exists():
        path = shipped
    study = validate_mapping(Study, read_mapping(path, "study", "docs/studies.md shows one"), str(path))
    if (beside := path.parent / study.base).exists():
        study = study.model_copy(update={"base": beside})
    for cell in distinct_cells(study):
        config = cell_config(study, cell, cell.lr)
        if cell.kind == "task":
            study.tasks[cell.task].require_positions(config.model.positions, cell.arm)
    for name, count in Counter(cell.name for cell in cells(study)).items():
        if count > 1:
            raise UserError(f"{path}: {count} runs would be in the folder {name}; their seeds or rates must differ")
    return study


def cells(study: Study) -> Iterator[Cell]:
    """Yield the runs in the order in which they are started: every arm's search and first seed, then further seeds."""
    for round_ in range(max(1, *(len(arm.seeds or study.seeds) for arm in study.arms.values()))):
        for size in study.sizes:
            for name, arm in study.arms.items():
                seeds = arm.seeds or study.seeds
                lrs = searched_lrs(study, name)
                if round_ == 0 and study.search is not None and len(lrs) > 1:
                    for lr in lrs:
                        yield Cell("search", size, name, study.search.seed, lr)
                if round_ < len(seeds):
                    yield Cell("final", size, name, seeds[round_], lrs[0] if len(lrs) == 1 else None)
    for task in study.tasks:
        for size in study.sizes:
            for name in study.arms:
                yield Cell("task", size, name, 0, None, task)


def searched_lrs(study: Study, arm: str) -> tuple[float, ...]:
    """Return the learning rates of which an arm's best is searched; the arm has one where there is but one."""
    return () if study.search is None else study.arms[arm].lrs or study.search.lrs


def distinct_cells(study: Study) -> Iterator[Cell]:
    """Yield one run of each kind, size, arm and task, of those that differ in their seeds and learning rates alone."""
    yield from {(cell.kind, cell.size, cell.arm, cell.task): cell for cell in cells(study)}.values()


def searched_by(study: Study, cell: Cell) -> list[Cell]:
    """Return the runs that find the learning rate of a final one."""
    return [
        other for other in cells(study) if other.kind == "search" and (other.size, other.arm) == (cell.size, cell.arm)
    ]


def cell_config(study: Study, cell: Cell, lr: float | None) -> RunConfig:
    """Return the config of a run at a learning rate; None leaves the config's.

    Raises:
        UserError: a key or a value is wrong, or the arm cannot be made as large as the reference.
    """
    config = _load(study, cell.size, cell.arm, study.study_dir / cell.name, lr, cell)
    if not study.match_parameters or cell.arm == study.reference:
        return config
    task = cell._replace(arm=study.reference) if cell.kind == "task" else None
    reference = _load(study, cell.size, study.reference, study.study_dir, None, task)
    width = _matching_mlp_width(config, count_body_parameters(reference.model), cell.arm)
    return config.model_copy(update={"model": replace(config.model, mlp_width=width)})


def _load(study: Study, size: str, arm: str, run_dir: Path, lr: float | None, cell: Cell | None) -> RunConfig:
    of_task = study.task_set if cell is not None and cell.kind == "task" else {}
    keys = {**study.set, **study.sizes[size], **study.arms[arm].set, **of_task, "run_dir": str(run_dir)}
    base = _load_base(study, size, arm, keys)
    changes: Keys = {}
    if cell is not None:
        changes["seed"] = cell.seed
        steps = base.train.steps
        if cell.kind == "search" and study.search is not None:
            steps = study.search.steps
        elif (own := study.arms[arm].steps) is not None:
            steps = own
        changes["train.steps"] = steps
        changes["optimizer.warmup_steps"] = round(base.optimizer.warmup_steps * steps / base.train.steps)
        if base.optimizer.decay_steps is not None:
            changes["optimizer.decay_steps"] = max(1, base.optimizer.decay_steps * steps // base.train.steps)
    if lr is not None:
        changes |= {"optimizer.lr": lr, "optimizer.min_lr": base.optimizer.min_lr * lr / base.optimizer.lr}
    return _load_base(study, size, arm, {**keys, **changes}) if changes else base


def _load_base(study: Study, size: str, arm: str, keys: Keys) -> RunConfig:
    try:
        return load_config(study.base, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    except UserError as error:
        raise UserError(f"arm {arm}{f' of size {size}' if size else ''}: {error}") from None


def _matching_mlp_width(config: RunConfig, wanted: int, arm: str) -> int:
    """Return the MLP width at which a model has `wanted` parameters beside its embeddings."""
    model = config.model
    width = model.mlp_channels
    now, wider = (count_body_parameters(replace(model, mlp_width=w)) for w in (width, width + 1))
    width += round((wanted - now) / (wider - now))
    if width >= 1:
        found = count_body_parameters(replace(model, mlp_width=width))
        if abs(found / wanted - 1) <= TOLERANCE:
            return width
    raise UserError(
        f"arm {arm}: no MLP width gives it the reference's {wanted:,} parameters beside embeddings within "
        f"{TOLERANCE:.0%}; change its shape, or set match_parameters: false"
    )
