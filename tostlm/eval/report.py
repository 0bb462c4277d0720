"""What an evaluation has found, as a table, JSON that is read again, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import torch

from tostlm.errors import UserError
from tostlm.eval.bootstrap import Interval
from tostlm.eval.perplexity import Score
from tostlm.files import read_json_object, write_atomically
from tostlm.plots import Curve, Panel, Point, draw_panels

PLOTTED_NATS = 0.2  # that a plot spans at least: less than a hundredth of it is no difference to look at
# What is on the x axes of plots of losses.
CONTEXT, TRAINED_TOKENS, TRAINED_FLOPS = (
    "context, tokens",
    "tokens of training",
    "floating-point operations of training",
)


class ModelScores(NamedTuple):
    """The scores of one model on one set; `positions` is the longest context it can read, None without a limit."""

    name: str
    checkpoint: str
    step: int | None
    positions: int | None
    data: str
    scores: Sequence[Score]
    gains: Sequence[tuple[int, Interval]]  # by context: what it is worth beside the one before, in nats a token
    clamped: int | None = None  # learned positions, beyond which it used the last one; None where it did not


LONGEST = 1 << 40  # tokens of a context, beyond which a file was not written here
SCORED_MODELS = pydantic.TypeAdapter(list[ModelScores])


def write_report(models: Sequence[ModelScores], protocol: str, dtype: torch.dtype | None, out: Path) -> None:
    """Write perplexity.json, .csv and .png into a folder."""
    content = {
        "protocol": protocol,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "models": [_as_json(model) for model in models],
    }
    write_atomically(out / "perplexity.json", json.dumps(content, indent=2) + "\n")
    write_atomically(out / "perplexity.csv", _csv(models))
    write_atomically(out / "perplexity.png", draw_panels([scores_panel(models, protocol)]))


def _as_json(model: ModelScores) -> dict[str, object]:
    gains = {context: found._asdict() for context, found in model.gains}
    scores = [{**_finite(score._asdict()), "gain": gains.get(score.context)} for score in model.scores]
    return {key: value for key, value in model._asdict().items() if key != "gains"} | {"scores": scores}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with None for the perplexities that no float holds, which are no JSON."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}


def _csv(models: Sequence[ModelScores]) -> str:
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["model", "data", *Score._fields])
    writer.writerows([model.name, model.data, *score] for model in models for score in model.scores)
    return rows.getvalue()


def report_table(models: Sequence[ModelScores], contexts: Sequence[int], protocol: str) -> str:
    """Return the table of models that were scored on one set, and what is to be said of it."""
    scored = max((score for model in models for score in model.scores), key=lambda score: score.tokens)
    lines = [f"{protocol}: {scored.tokens:,} tokens of {scored.documents:,} documents of {models[0].data}"]
    lines += [f"{'context':>9}" + "".join(f"{model.name:>30}" for model in models)]
    for context in sorted(contexts):
        cells = [next((s for s in model.scores if s.context == context), None) for model in models]
        lines.append(f"{context:>9}" + "".join(f"{_cell(m, s):>30}" for m, s in zip(models, cells, strict=True)))
    lines += [f"{m.name} has {m.positions} learned positions and reads no further" for m in models if m.positions]
    lines += [clamping(m.name, m.clamped) for m in models if m.clamped]
    return "\n".join([*lines, *(line for model in models for line in _gains(model))])


def short_number(value: float) -> str:
    """Return a number with two decimals; a large one in powers of ten."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def clamping(name: str, positions: int) -> str:
    """Return what is to be said of a model that read beyond its learned positions."""
    return f"{name} has {positions} learned positions; beyond them every token had the last one"


def _cell(model: ModelScores, score: Score | None) -> str:
    if score is None:
        return "beyond its positions" if model.positions else "no such token"
    half = None if score.low is None else score.perplexity * ((score.high or 0.0) - score.low) / 2
    error = "" if half is None else f" ±{short_number(half)}"
    return f"{short_number(score.perplexity)}{error} ({score.bits_per_byte:.4f} b/B)"


def _gains(model: ModelScores) -> Iterator[str]:
    """Yield lines on what longer contexts are worth to a model, where the same tokens were scored at several."""
    if model.gains:
        gains = ", ".join(f"{context:,}: {_with_error(found)}" for context, found in model.gains)
        yield f"{model.name}: nats a token that each context gains over the one before: {gains}"
        yield verdict(model)


def verdict(model: ModelScores) -> str:
    """Return up to which context a model's loss falls, and where it rises, by the intervals of its gains."""
    helped = [context for context, found in model.gains if (found.low if found.low is not None else found.value) > 0]
    harmed = [context for context, found in model.gains if (found.high if found.high is not None else found.value) < 0]
    return f"{model.name}: {f'improves up to {max(helped):,} tokens' if helped else 'no context improves it'}" + (
        f", is worse at {', '.join(f'{context:,}' for context in harmed)} than before" if harmed else ""
    )


def _with_error(found: Interval) -> str:
    return f"{found.value:+.4f}" + ("" if found.low is None else f" ±{((found.high or 0.0) - found.low) / 2:.4f}")


def loss_panel(xlabel: str, curves: Sequence[Curve], base: Literal[2, 10] = 2, title: str = "") -> Panel:
    """Return the plot of losses in nats a token, with perplexities on the right."""
    return Panel(xlabel, "loss, nats a token", curves, title, base, PLOTTED_NATS, exp_label="perplexity")


def scores_panel(models: Sequence[ModelScores], protocol: str, colors: Mapping[str, int] | None = None) -> Panel:
    """Return the plot of models' losses by context; `colors` has the color of a model by its name."""
    several = len({model.data for model in models}) > 1
    sets = list(dict.fromkeys(model.data for model in models))
    curves = []
    for model in models:
        label = f"{model.name} ({model.positions} positions)" if model.positions else model.name
        label += f" ({model.clamped} positions, then the last)" if model.clamped else ""
        points = [Point(score.context, score.nats, score.low, score.high) for score in model.scores]
        color = None if colors is None else colors[model.name]
        style = 0 if colors is None else sets.index(model.data)
        curves.append(Curve(f"{label}, {model.data}" if several else label, points, color, style))
    xlabel = "tokens of the document before, up to" if protocol == "stream" else CONTEXT
    return loss_panel(xlabel, curves, title=f"Held-out loss ({protocol})")


def read_report(path: Path) -> tuple[str, list[ModelScores]]:
    """Return the protocol and the scores of a perplexity.json, as `write_report` was given them.

    Raises:
        UserError: the file is damaged, or another one.
    """
    content = read_json_object(path.read_bytes())
    try:
        found = [_from_json(model) for model in (content or {})["models"]]
        models = SCORED_MODELS.validate_python(found)
        if not all(0 < score.context < LONGEST for model in models for score in model.scores):
            raise ValueError("a context is out of range")
        return str((content or {})["protocol"]), models
    except (KeyError, TypeError, ValueError, AttributeError, pydantic.ValidationError) as error:
        raise wrong_file(path, "tostlm eval perplexity", error) from None


def _from_json(model: Mapping[str, Any]) -> dict[str, Any]:
    scores = [{key: score[key] for key in Score._fields} for score in model["scores"]]
    for score in scores:
        score["perplexity"] = math.inf if score["perplexity"] is None else score["perplexity"]
    gains = [(score["context"], score["gain"]) for score in model["scores"] if score["gain"] is not None]
    return {key: model[key] for key in ModelScores._fields if key != "gains"} | {"scores": scores, "gains": gains}


def wrong_file(path: Path, command: str, error: Exception) -> UserError:
    """Return the error that a file does not hold what `command` writes, with the first thing that is wrong in it."""
    problem = f"it has no {error}" if isinstance(error, KeyError) else "it is no such JSON"
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"{place}: {first['msg']}" if place else first["msg"]
    return UserError(f"{path} is not what `{command}` writes ({problem}); run that again, or move the file elsewhere")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, its numbers on the right."""
    lines = [[escaped(cell) for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def escaped(cell: str) -> str:
    """Return a text without what Markdown would read as the end of a cell or as HTML."""
    return cell.replace("|", "\\|").replace("<", "&lt;")
