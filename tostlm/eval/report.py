"""Perplexity by context of several models on the same text: measured, and written as a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tostlm.checkpoint import Checkpoint, load_checkpoint, run_folder
from tostlm.data import VALIDATION, TokenSet
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.eval.bootstrap import Interval
from tostlm.eval.losses import PASS_TOKENS
from tostlm.eval.perplexity import Score, Totals, gain, measure, require_same_tokenizer, spread
from tostlm.eval.protocols import PROTOCOLS, same_targets
from tostlm.files import distinct_names, require_writable, write_atomically
from tostlm.plots import new_figure, png_bytes, require_matplotlib

ENOUGH = 0.01  # standard error over windows, in nats a token, at which no more are needed
FEWEST_WINDOWS = 64
PLOTTED_NATS = 0.2  # that a plot spans at least: less than a hundredth of it is no difference to look at


class EvalSettings(NamedTuple):
    """How models are scored."""

    contexts: Sequence[int]  # in tokens
    protocol: str = "same-targets"  # one of PROTOCOLS
    windows: int | None = None  # scored at each context, or documents of a stream; None for enough, or for all
    device: torch.device | None = None  # None is `best_device`
    dtype: torch.dtype | None = None  # of the weights; None is the checkpoint's
    pass_tokens: int = PASS_TOKENS  # that one forward pass reads


class ModelScores(NamedTuple):
    """The scores of one model on one set; `positions` is the longest context it can read, None without a limit."""

    name: str
    checkpoint: str
    step: int
    positions: int | None
    data: str
    scores: Sequence[Score]
    gains: Sequence[tuple[int, Interval]]  # by context: what it is worth beside the one before, in nats a token


def evaluate_perplexity(paths: Sequence[Path], data: Sequence[Path], settings: EvalSettings, out: Path | None) -> str:
    """Score checkpoints on held-out text at growing contexts, write the report and return its table.

    Args:
        paths: checkpoints, or folders of runs for their newest ones.
        data: prepared folders; () is that of the first checkpoint's run, of a blend the first one.
        out: folder of the report; None: the first run's folder.

    Raises:
        UserError: a checkpoint, the data and the contexts do not fit each other, or matplotlib is missing.
    """
    require_matplotlib()
    checkpoints = [_load(path, settings) for path in paths]
    sets = [TokenSet(f, VALIDATION) for f in data or [checkpoints[0].config.data.sets[0][0]]]
    folders = [run_folder(checkpoint.path) for checkpoint in checkpoints]
    out = out or folders[0]
    require_writable(out)
    for checkpoint in checkpoints:
        _require_fit(checkpoint, sets, min(settings.contexts))
    found = []
    for tokens in sets:
        windows = _windows(checkpoints[0], tokens, settings)
        for name, checkpoint in zip(distinct_names(folders), checkpoints, strict=True):
            found.append(_score(name, checkpoint, tokens, settings._replace(windows=windows)))
    content = {
        "protocol": settings.protocol,
        "dtype": None if settings.dtype is None else str(settings.dtype).removeprefix("torch."),
        "models": [_as_json(model) for model in found],
    }
    write_atomically(out / "perplexity.json", json.dumps(content, indent=2) + "\n")
    write_atomically(out / "perplexity.csv", _csv(found))
    write_atomically(out / "perplexity.png", _plot(found, settings.protocol))
    tables = [_table([model for model in found if model.data == str(tokens.folder)], settings) for tokens in sets]
    return "\n\n".join(tables) + f"\nwritten to {out}/perplexity.json, .csv and .png"


def _load(path: Path, settings: EvalSettings) -> Checkpoint:
    checkpoint = load_checkpoint(path, settings.device or best_device())
    return checkpoint if settings.dtype is None else checkpoint._replace(lm=checkpoint.lm.to(settings.dtype))


def _require_fit(checkpoint: Checkpoint, sets: Sequence[TokenSet], shortest: int) -> None:
    for tokens in sets:
        require_same_tokenizer(checkpoint, tokens)
    positions = checkpoint.config.model.positions
    if positions is not None and positions < shortest:
        raise UserError(
            f"{checkpoint.path} has {positions} positions, fewer than the shortest of --contexts, {shortest}"
        )


def _windows(checkpoint: Checkpoint, tokens: TokenSet, settings: EvalSettings) -> int | None:
    """Return how many windows are scored: of the same targets, where none are asked for, enough for a small error."""
    if settings.windows is not None or settings.protocol != "same-targets":
        return settings.windows
    some = same_targets(tokens, settings.contexts, FEWEST_WINDOWS)
    shortest = [passage for passage in some if passage.contexts == (min(settings.contexts),)]
    needed = (spread(checkpoint, tokens, shortest, settings.pass_tokens) / ENOUGH) ** 2
    return max(FEWEST_WINDOWS, math.ceil(needed))


def _score(name: str, checkpoint: Checkpoint, tokens: TokenSet, settings: EvalSettings) -> ModelScores:
    positions = checkpoint.config.model.positions
    passages = list(PROTOCOLS[settings.protocol](tokens, settings.contexts, settings.windows, positions))
    totals: dict[int, Totals] = {}
    # `disable=None` shows the bar on a terminal only.
    with tqdm(total=sum(p.end - p.start - 1 for p in passages), desc=name, unit=" tokens", disable=None) as bar:
        for context, sums in measure(checkpoint, tokens, passages, settings.pass_tokens, bar.update):
            if sums.tokens.any():
                totals[context] = sums
    scores = [Score.of(context, sums) for context, sums in totals.items()]
    pairs = pairwise(totals.items()) if settings.protocol == "same-targets" else ()
    gains = [(context, gain(before, after)) for (_, before), (context, after) in pairs]
    step = checkpoint.train_state.step
    return ModelScores(name, str(checkpoint.path), step, positions, str(tokens.folder), scores, gains)


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


def _table(models: Sequence[ModelScores], settings: EvalSettings) -> str:
    scored = max((score for model in models for score in model.scores), key=lambda score: score.tokens)
    lines = [f"{settings.protocol}: {scored.tokens:,} tokens of {scored.documents:,} documents of {models[0].data}"]
    lines += [f"{'context':>9}" + "".join(f"{model.name:>30}" for model in models)]
    for context in sorted(settings.contexts):
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
