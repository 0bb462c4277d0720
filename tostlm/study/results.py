"""What is known of a finished run of a study, as a file in the run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import pydantic

from tostlm.config import RunConfig, dump_config, restore_config
from tostlm.data import read_manifest
from tostlm.errors import UserError
from tostlm.files import read_json_object, write_atomically
from tostlm.study.plan import Cell, Study, cell_config, cells, searched_by
from tostlm.study.probe import Answer

RESULT = "result.json"


@dataclass(frozen=True)
class Settings:
    """All that determines a run."""

    config: str  # as YAML
    inputs: list[str]  # what the config does not say: the hashes of its data, or the task

    def lines(self, name: str) -> list[str]:
        """Return the settings line by line, with what a later tostlm added at the defaults; `name` is the run's."""
        try:
            config = dump_config(restore_config(self.config, name))
        except UserError:  # of a version that had other keys
            config = self.config
        return [*config.splitlines(), *self.inputs]


@dataclass(frozen=True)
class Result:
    """Losses are in nats a token, of held-out text."""

    lr: float
    settings: Settings
    loss: float | None  # at the end of training, on the run's own held-out split; None where training diverged
    tokens: int = 0  # trained on
    parameters: int = 0
    body_parameters: int = 0  # beside embeddings and output projection
    flops_per_token: float = 0.0  # of training
    state_bytes: int = 0  # after as many tokens as a training sequence has
    tokens_per_second: float = 0.0  # the median over the training steps
    validation: list[list[float]] = field(default_factory=list)  # step, tokens and loss
    # The largest norm of a gradient beside the median of those before it, and at which step.
    largest_gradient: list[float] = field(default_factory=list)
    evaluation: str = ""  # how the following were measured: see `evaluation_of`
    contexts: dict[str, float] = field(default_factory=dict)  # loss of the same tokens by context length
    repetition: dict[str, list[float]] = field(default_factory=dict)  # see `tostlm.eval.loss_by_repetition`
    answers: dict[str, Answer] = field(default_factory=dict)  # of a task, by tokens


RESULT_FIELDS = pydantic.TypeAdapter(Result)


def settings_of(study: Study, cell: Cell, config: RunConfig) -> Settings:
    """Return all that determines a run."""
    if cell.kind == "task":
        return Settings(dump_config(config), [f"task: {study.tasks[cell.task].model_dump_json()}"])
    return Settings(dump_config(config), [f"content_sha256: {_content_sha256(x)}" for x in config.data.folders])


def evaluation_of(study: Study, cell: Cell) -> str:
    """Return how a trained run is measured; of runs that are measured by their training alone, nothing."""
    if cell.kind != "final" or study.evaluation is None:
        return ""
    own = study.evaluation.data
    return study.evaluation.model_dump_json() + ("" if own is None else f" of {_content_sha256(own)}")


def _content_sha256(folder: Path) -> str:
    """Return the hash of all that a prepared folder holds."""
    try:
        return read_manifest(folder).content_sha256
    except UserError:  # it is one where the data is read; what is finished can be looked at without
        return "missing"


def write_result(study: Study, cell: Cell, result: Result) -> None:
    """Write a run's result."""
    write_atomically(study.study_dir / cell.name / RESULT, json.dumps(asdict(result), indent=1) + "\n")


def read_result(study: Study, cell: Cell) -> Result | None:
    """Return a run's result; None where it is not finished, or was measured otherwise than the study now asks for.

    Raises:
        UserError: the file is damaged.
    """
    path = study.study_dir / cell.name / RESULT
    try:
        result = RESULT_FIELDS.validate_python(read_json_object(path.read_bytes()))
        return result if result.evaluation == evaluation_of(study, cell) else None
    except FileNotFoundError:
        return None
    except pydantic.ValidationError:
        raise UserError(f"{path} is damaged; remove it, and the run is measured again") from None


def require_same_settings(study: Study) -> None:
    """Check that the finished runs had the settings that the study has now, and the learning rate that is now best.

    Raises:
        UserError: one had others.
    """
    for cell in cells(study):
        result = read_result(study, cell)
        if result is None:
            continue
        now = settings_of(study, cell, cell_config(study, cell, None if cell.kind == "task" else result.lr))
        then, wanted = result.settings.lines(cell.name), now.lines(cell.name)
        for had, wants in zip_longest(then, wanted, fillvalue="nothing there"):
            if had != wants:
                raise _other_settings(study, cell, had.strip(), f"the study now says {wants.strip()}")
        best = best_lr(study, cell)
        if cell.kind == "final" and best not in (None, result.lr):
            raise _other_settings(study, cell, f"learning rate {result.lr:g}", f"its best is now {best:g}")


def _other_settings(study: Study, cell: Cell, had: str, now: str) -> UserError:
    return UserError(
        f"{study.study_dir / cell.name} is finished with {had}, and {now}; remove the folder to run it again, or give "
        "the study another study_dir"
    )


def best_lr(study: Study, cell: Cell) -> float | None:
    """Return a run's own learning rate, or that of the lowest loss in the search for it; None if there is none."""
    if cell.lr is not None:
        return cell.lr
    results = [read_result(study, other) for other in searched_by(study, cell)]
    return min(((r.loss, r.lr) for r in results if r is not None and r.loss is not None), default=(0.0, None))[1]
