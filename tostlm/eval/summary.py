"""What the folder of a run holds about its model: the config, what training reported and what evaluations found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from tostlm.checkpoint import COMPLETE, CONFIG, read_train_state, run_folder
from tostlm.config import RunConfig, load_config
from tostlm.errors import UserError
from tostlm.eval.models import folder_names
from tostlm.eval.recall import FILE as RECALL
from tostlm.eval.recall import ProbedModel, read_recall
from tostlm.eval.report import LONGEST, ModelScores, read_report, wrong_file
from tostlm.files import read_json_lines, short_names
from tostlm.model import training_flops_per_token

PERPLEXITY = "perplexity.json"


class Validation(NamedTuple):
    """The loss on held-out text after so many steps of training."""

    step: int
    tokens: int
    flops: float
    loss: float  # in nats a token


class RunSummary(NamedTuple):
    """A run, or a checkpoint of one, as far as its training is on record."""

    name: str
    folder: Path  # of the run
    config: RunConfig
    step: int  # that it has come to
    tokens_per_second: float | None  # in training, the median of its reports; None without any
    validation: Sequence[Validation]

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        return self.config.tokens_after(self.step)


class DecodeSpeed(pydantic.BaseModel):
    """How fast a model writes one token after so many, and reads those."""

    model: str
    context: int = pydantic.Field(gt=0, lt=LONGEST)
    milliseconds: float = pydantic.Field(gt=0)  # a token
    prefill_tokens_per_second: float | None = None
    state_bytes: int | None = None


class DecodeFile(pydantic.BaseModel):
    """The content of a file of `tostlm bench decode`."""

    machine: str
    decode: tuple[DecodeSpeed, ...]


def read_runs(paths: Sequence[Path]) -> list[RunSummary]:
    """Return what is known of runs, or of checkpoints in them, by names that tell them apart.

    Raises:
        UserError: a folder is neither, or its config cannot be read.
    """
    runs = [_read_run(path) for path in paths]
    names = folder_names([(run.folder, run.step) for run in runs])
    found: dict[str, RunSummary] = {}
    for name, run in zip(names, runs, strict=True):
        found.setdefault(name, run._replace(name=name))
    return list(found.values())


def _read_run(path: Path) -> RunSummary:
    is_checkpoint = (path / COMPLETE).is_file()
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is neither a checkpoint nor the folder of a run; it has no {CONFIG}")
    config, folder = load_config(path / CONFIG), run_folder(path) if is_checkpoint else path
    entries, _ = read_json_lines(folder / "metrics.jsonl")
    entries = [entry for entry in entries if _is_step(entry.get("step"), config)]
    step = read_train_state(path).step if is_checkpoint else max((entry["step"] for entry in entries), default=0)
    entries = [entry for entry in entries if entry["step"] <= step]
    speeds = [value for entry in entries if (value := _number(entry.get("tokens_per_second")))]
    return RunSummary(
        "", folder, config, step, statistics.median(speeds) if speeds else None, list(_validations(config, entries))
    )


def _validations(config: RunConfig, entries: Iterable[dict[str, Any]]) -> Iterator[Validation]:
    for entry in entries:
        loss, step = _number(entry.get("loss")), entry["step"]
        if entry.get("kind") == "validation" and loss is not None:
            yield Validation(step, config.tokens_after(step), flops_after(config, step), loss)


def _is_step(value: object, config: RunConfig) -> bool:
    return isinstance(value, int) and 0 <= value <= config.train.steps


def _number(value: object) -> float | None:
    """Return a number of a file that may have been edited; None of what is none, or not finite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def flops_after(config: RunConfig, step: int) -> float:
    """Return the floating-point operations of the first `step` steps of training."""
    stages, total = config.stages, 0.0
    for stage, end in zip(stages, [*(later.first_step for later in stages[1:]), step], strict=True):
        tokens = config.tokens_after(min(end, step)) - config.tokens_after(min(stage.first_step, step))
        total += tokens * training_flops_per_token(config.model, stage.context_tokens)
    return total


def read_scores(runs: Sequence[RunSummary]) -> dict[str, list[ModelScores]]:
    """Return by protocol what perplexity.json has of models, in the folders of runs and in the folders in these.

    Of a model and set that several files have, the first counts. Models that are runs have the runs' names, and sets
    the last parts of theirs.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, dict[tuple[str, str], ModelScores]] = {}
    for path in _files(runs, PERPLEXITY):
        protocol, models = read_report(path)
        for model in models:
            named = model._replace(name=_name(model.name, model.checkpoint, model.step, runs))
            found.setdefault(protocol, {}).setdefault((model.checkpoint, model.data), named)
    sets = list(dict.fromkeys(data for models in found.values() for _, data in models))
    names = dict(zip(sets, short_names([Path(data) for data in sets]), strict=True))
    return {
        protocol: [model._replace(data=names[model.data]) for model in models.values()]
        for protocol, models in found.items()
    }


def read_answers(runs: Sequence[RunSummary]) -> list[ProbedModel]:
    """Return what recall.json has of models, as `read_scores` does.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, ProbedModel] = {}
    for path in _files(runs, RECALL):
        for model in read_recall(path):
            found.setdefault(
                model.checkpoint, model._replace(name=_name(model.name, model.checkpoint, model.step, runs))
            )
    return list(found.values())


def _files(runs: Sequence[RunSummary], name: str) -> list[Path]:
    folders = dict.fromkeys(run.folder for run in runs)
    return [path for folder in folders for path in [folder / name, *sorted(folder.glob(f"*/{name}"))] if path.is_file()]


def _name(name: str, checkpoint: str, step: int | None, runs: Sequence[RunSummary]) -> str:
    """Return what a model of an evaluation is called: as the run it is of, with its step if that is another."""
    own = [run for run in runs if run.folder.resolve() == run_folder(Path(checkpoint)).resolve()]
    if not own or step is None:
        return name
    exact = next((run.name for run in own if run.step == step), None)
    return exact or f"{own[0].name} at step {step:,}"


def read_decode_file(path: Path) -> DecodeFile:
    """Return the content of a file that `tostlm bench decode` wrote.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    command = "tostlm bench decode"
    try:
        return DecodeFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; `{command}` writes it") from None
    except pydantic.ValidationError as error:
        raise wrong_file(path, command, error) from None
