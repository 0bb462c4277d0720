"""Reports of perplexity by context: a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.checkpoint import load_checkpoint, run_folder
from tostlm.data import VALIDATION, TokenSet, choose_targets
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.eval.perplexity import Score, score_contexts
from tostlm.files import distinct_names, require_writable, write_atomically
from tostlm.plots import new_figure, png_bytes, require_matplotlib


class ModelScores(NamedTuple):
    """The scores of one model; `positions` is the longest context it can read, None without a limit."""

    name: str
    checkpoint: str
    step: int
    positions: int | None
    scores: Sequence[Score]


def evaluate_perplexity(
    paths: Sequence[Path], contexts: Sequence[int], data: Path | None, windows: int, out: Path | None
) -> str:
    """Score checkpoints on the same target tokens at every context, write the report and return its table.

    Args:
        paths: checkpoints, or folders of runs for their newest ones.
        contexts: context lengths in tokens.
        data: a prepared folder; None: that of the first checkpoint's run, of a blend the first one.
        windows: windows scored at each context.
        out: folder of the report; None: the first run's folder.

    Raises:
        UserError: a checkpoint, the data and the contexts do not fit each other, or matplotlib is missing.
    """
    require_matplotlib()
    checkpoints = [load_checkpoint(path, best_device()) for path in paths]
    tokens = TokenSet(data or checkpoints[0].config.data.sets[0][0], VALIDATION)
    folders = [run_folder(checkpoint.path) for checkpoint in checkpoints]
    out = out or folders[0]
    require_writable(out)
    targets = choose_targets(tokens, contexts, windows)
    models = []
    for name, checkpoint in zip(distinct_names(folders), checkpoints, strict=True):
        positions = checkpoint.config.model.positions
        if positions is not None and positions < min(contexts):
            shortest = f"the shortest of --contexts, {min(contexts)}"
            raise UserError(f"{checkpoint.path} has {positions} positions, fewer than {shortest}")
        scores = list(score_contexts(checkpoint, tokens, targets, contexts))
        models.append(ModelScores(name, str(checkpoint.path), checkpoint.train_state.step, positions, scores))
    content = {
        "data": str(tokens.folder),
        "targets": len(targets.ends) * targets.span,
        "models": [{**model._asdict(), "scores": [score._asdict() for score in model.scores]} for model in models],
    }
    write_atomically(out / "perplexity.json", json.dumps(content, indent=2) + "\n")
    write_atomically(out / "perplexity.csv", _csv(models))
    write_atomically(out / "perplexity.png", _plot(models))
    return f"{_table(models, contexts)}\nwritten to {out}/perplexity.json, .csv and .png"


def _csv(models: Sequence[ModelScores]) -> str:
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["model", *Score._fields])
    writer.writerows([model.name, *score] for model in models for score in model.scores)
    return rows.getvalue()


def _table(models: Sequence[ModelScores], contexts: Sequence[int]) -> str:
    lines = [f"{'context':>8}" + "".join(f"{model.name:>24}" for model in models)]
    for context in sorted(contexts):
        line = f"{context:>8}"
        for model in models:
            score = next((s for s in model.scores if s.context == context), None)
            cell = f"{score.perplexity:.2f} ({score.bits_per_byte:.4f} b/B)" if score else "beyond its positions"
            line += f"{cell:>24}"
        lines.append(line)
    lines += [f"{m.name} has {m.positions} learned positions and reads no further" for m in models if m.positions]
    return "\n".join(lines)


def _plot(models: Sequence[ModelScores]) -> bytes:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for model in models:
        label = f"{model.name} ({model.positions} positions)" if model.positions else model.name
        contexts = [score.context for score in model.scores]
        axes.plot(contexts, [score.perplexity for score in model.scores], marker="o", label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({score.context for model in models for score in model.scores})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="context, tokens", ylabel="perplexity", title="Held-out perplexity of the same tokens by context")
    axes.grid(alpha=0.3)
    axes.legend()
    return png_bytes(figure)
