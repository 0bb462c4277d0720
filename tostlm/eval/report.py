"""Reports of perplexity by context: a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.eval.perplexity import Score
from tostlm.files import write_atomically


class ModelScores(NamedTuple):
    """The scores of one model; `positions` is the longest context it can read, None without a limit."""

    name: str
    checkpoint: str
    step: int
    positions: int | None
    scores: Sequence[Score]


def write_report(models: Sequence[ModelScores], facts: Mapping[str, object], out: Path) -> None:
    """Write perplexity.json, perplexity.csv and perplexity.png to the folder `out`."""
    content = {
        **facts,
        "models": [{**m._asdict(), "scores": [s._asdict() for s in m.scores]} for m in models],
    }
    write_atomically(out / "perplexity.json", json.dumps(content, indent=2) + "\n")
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["model", *Score._fields])
    for model in models:
        writer.writerows([model.name, *score] for score in model.scores)
    write_atomically(out / "perplexity.csv", rows.getvalue())
    write_atomically(out / "perplexity.png", _plot(models))


def table(models: Sequence[ModelScores], contexts: Sequence[int]) -> str:
    """Return a table of the perplexity of every model at every context."""
    lines = [f"{'context':>8}" + "".join(f"{model.name:>24}" for model in models)]
    for context in sorted(contexts):
        cells = []
        for model in models:
            score = next((s for s in model.scores if s.context == context), None)
            cells.append(f"{score.perplexity:.2f} ({score.bits_per_byte:.4f} b/B)" if score else "beyond its positions")
        lines.append(f"{context:>8}" + "".join(f"{cell:>24}" for cell in cells))
    lines += [f"{m.name} has {m.positions} learned positions and reads no further" for m in models if m.positions]
    return "\n".join(lines)


def _plot(models: Sequence[ModelScores]) -> bytes:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for model in models:
        label = f"{model.name} ({model.positions} positions)" if model.positions else model.name
        contexts = [score.context for score in model.scores]
        axes.plot(contexts, [score.perplexity for score in model.scores], marker="o", label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({score.context for model in models for score in model.scores})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("perplexity")
    axes.set_title("Held-out perplexity of the same tokens by context")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()
