"""What an evaluation has found, as a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tostlm.eval.bootstrap import Interval
from tostlm.eval.perplexity import Score
from tostlm.files import write_atomically
from tostlm.plots import new_figure, png_bytes

PLOTTED_NATS = 0.2  # that a plot spans at least: less than a hundredth of it is no difference to look at


class ModelScores(NamedTuple):
    """The scores of one model on one set; `positions` is the longest context it can read, None without a limit."""

    name: str
    checkpoint: str
    step: int | None
    positions: int | None
    data: str
    scores: Sequence[Score]
    gains: Sequence[tuple[int, Interval]]  # by context: what it is worth beside the one before, in nats a token


def write_report(models: Sequence[ModelScores], protocol: str, dtype: torch.dtype | None, out: Path) -> None:
    """Write perplexity.json, .csv and .png into a folder."""
    content = {
        "protocol": protocol,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "models": [_as_json(model) for model in models],
    }
    write_atomically(out / "perplexity.json", json.dumps(content, indent=2) + "\n")
    write_atomically(out / "perplexity.csv", _csv(models))
    write_atomically(out / "perplexity.png", _plot(models, protocol))


def _as_json(model: ModelScores) -> dict[str, object]:
    gains = {context: found._asdict() for context, found in model.gains}
    scores = [{**score._asdict(), "gain": gains.get(score.context)} for score in model.scores]
    return {key: value for key, value in model._asdict().items() if key != "gains"} | {"scores": scores}


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
    return "\n".join([*lines, *(line for model in models for line in _verdict(model))])


def _cell(model: ModelScores, score: Score | None) -> str:
    if score is None:
        return "beyond its positions" if model.positions else "no such token"
    error = "" if score.low is None else f" ±{score.perplexity * ((score.high or 0.0) - score.low) / 2:.2f}"
    return f"{score.perplexity:.2f}{error} ({score.bits_per_byte:.4f} b/B)"


def _verdict(model: ModelScores) -> Iterator[str]:
    """Yield a line on what longer contexts are worth to a model, where the same tokens were scored at several."""
    if not model.gains:
        return
    gains = ", ".join(f"{context:,}: {_with_error(found)}" for context, found in model.gains)
    helped = [context for context, found in model.gains if (found.low if found.low is not None else found.value) > 0]
    harmed = [context for context, found in model.gains if (found.high if found.high is not None else found.value) < 0]
    yield f"{model.name}: nats a token that each context gains over the one before: {gains}"
    yield (
        f"{model.name}: {f'improves up to {max(helped):,} tokens' if helped else 'no context improves it'}"
        + (f", is worse at {', '.join(f'{context:,}' for context in harmed)} than before" if harmed else "")
    )


def _with_error(found: Interval) -> str:
    return f"{found.value:+.4f}" + ("" if found.low is None else f" ±{((found.high or 0.0) - found.low) / 2:.4f}")


def _plot(models: Sequence[ModelScores], protocol: str) -> bytes:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    several = len({model.data for model in models}) > 1
    for model in models:
        label = f"{model.name} ({model.positions} positions)" if model.positions else model.name
        contexts = [score.context for score in model.scores]
        nats = [score.nats for score in model.scores]
        (line,) = axes.plot(contexts, nats, marker="o", label=f"{label}, {model.data}" if several else label)
        low = [score.nats if score.low is None else score.low for score in model.scores]
        high = [score.nats if score.high is None else score.high for score in model.scores]
        axes.fill_between(contexts, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    bottom, top = axes.get_ylim()
    rest = max(0.0, PLOTTED_NATS - (top - bottom)) / 2
    axes.set_ylim(bottom - rest, top + rest)
    axes.secondary_yaxis("right", functions=(np.exp, lambda x: np.log(np.maximum(x, 1.0)))).set_ylabel("perplexity")
    ticks = sorted({score.context for model in models for score in model.scores})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="context, tokens", ylabel="loss, nats a token", title=f"Held-out loss by context ({protocol})")
    axes.grid(alpha=0.3)
    axes.legend()
    return png_bytes(figure)
