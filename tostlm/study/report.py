"""The report of a study: a Markdown table, JSON and plots of what is finished so far."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Literal, NamedTuple

from tostlm.eval.report import CONTEXT, TRAINED_FLOPS, TRAINED_TOKENS, loss_panel, markdown_table
from tostlm.files import write_atomically
from tostlm.plots import Curve, Point, draw_panels
from tostlm.study.plan import Cell, Study, cells, searched_lrs
from tostlm.study.results import Result, read_result

# Student's t for two-sided intervals of 95%, by degrees of freedom from 1 on, and the normal quantile that it tends to.
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_95 = 1.95996


class Row(NamedTuple):
    """The finished final runs of an arm at a size, one a seed."""

    size: str
    arm: str
    results: dict[int, Result]  # by seed

    @property
    def first(self) -> Result:
        """The result of any seed, for what is the same of all."""
        return next(iter(self.results.values()))

    @property
    def label(self) -> str:
        """What the row is called in plots and tables."""
        return _label(self.arm, self.size)


class LrSearch(NamedTuple):
    """The finished runs of the search for an arm's learning rate at a size."""

    label: str
    losses: dict[float, float | None]  # by learning rate; None where training diverged

    @property
    def best(self) -> float | None:
        """The learning rate of the lowest loss; None if all diverged."""
        return min(((loss, lr) for lr, loss in self.losses.items() if loss is not None), default=(0.0, None))[1]


class Mean(NamedTuple):
    """A mean over seeds, and half its confidence interval of 95%; None of a single seed."""

    value: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of a value of each seed."""
        if len(values) < 2:
            return cls(values[0], None)
        return cls(statistics.fmean(values), _t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The ends of the interval."""
        return (None, None) if self.half is None else (self.value - self.half, self.value + self.half)

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.half is None else f"{self.value:.3f} ± {self.half:.3f}"


def _t_95(freedom: int) -> float:
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    # The first terms of its expansion (Abramowitz and Stegun, 26.7.5), right to three digits from here on.
    z = Z_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def write_report(study: Study) -> None:
    """Write report.md, report.json and the plots into the study's folder, of what is finished so far."""
    rows, searches = list(_rows(study)), list(_searches(study))
    write_atomically(study.study_dir / "report.json", json.dumps(_as_json(study, rows), indent=1) + "\n")
    write_atomically(study.study_dir / "report.md", _markdown(study, rows, searches))
    plots = {name: loss_panel(label, [c(row) for row in rows], base) for name, (label, base, c) in PLOTS.items()}
    plots["loss-by-lr"] = loss_panel("learning rate", [_by_lr(search) for search in searches])
    for name, panel in plots.items():
        if panel.curves:
            write_atomically(study.study_dir / f"{name}.png", draw_panels([panel]))


def _rows(study: Study) -> Iterator[Row]:
    for size in study.sizes:
        for arm in study.arms:
            mine = [cell for cell in cells(study) if (cell.kind, cell.size, cell.arm) == ("final", size, arm)]
            results = {cell.seed: result for cell in mine if (result := read_result(study, cell)) is not None}
            if results:
                yield Row(size, arm, results)


def _searches(study: Study) -> Iterator[LrSearch]:
    for size in study.sizes:
        for arm in study.arms:
            mine = [cell for cell in cells(study) if (cell.kind, cell.size, cell.arm) == ("search", size, arm)]
            found = {cell.lr: result.loss for cell in mine if (result := read_result(study, cell)) and cell.lr}
            if found:
                yield LrSearch(_label(arm, size), found)


def _markdown(study: Study, rows: Sequence[Row], searches: Sequence[LrSearch]) -> str:
    """Return the tables of a report."""
    head = ["model", "body parameters", "tokens", "learning rate", "loss", f"minus {study.reference}"]
    head += [f"tokens to {study.reference}'s loss"]
    head += [f"{context:,}" for context in study.contexts] + ["state bytes", "tokens/s", "largest gradient"]
    lines = markdown_table(head, [_cells_of(study, row, rows) for row in rows])
    distances = list(
        dict.fromkeys(name for row in rows for result in row.results.values() for name in result.repetition)
    )
    if distances:
        lines += [
            "",
            *markdown_table(["rare pairs, read last … tokens before", *distances], _repetitions(rows, distances)),
        ]
    parts = [[*_notes(study, rows), "", *lines] if rows else [], _search_table(study, searches), _tasks(study)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _search_table(study: Study, searches: Sequence[LrSearch]) -> list[str]:
    """Return the table of searched learning rates: a row an arm and size, a column a rate."""
    if not searches or study.search is None:
        return []
    rates = sorted({lr for search in searches for lr in search.losses})
    rows = [[search.label, *(_loss_at(search, lr) for lr in rates)] for search in searches]
    about = f"Losses after {study.search.steps:,} steps at each learning rate searched, the best in bold:"
    return [about, "", *markdown_table(["learning rate", *(f"{lr:g}" for lr in rates)], rows)]


def _loss_at(search: LrSearch, lr: float) -> str:
    if lr not in search.losses:
        return ""
    loss = search.losses[lr]
    text = "diverged" if loss is None else f"{loss:.3f}"
    return f"**{text}**" if lr == search.best else text


def _repetitions(rows: Sequence[Row], distances: Sequence[str]) -> Iterator[list[str]]:
    for row in rows:
        found = [[r.repetition[name][0] for r in row.results.values() if name in r.repetition] for name in distances]
        yield [row.label, *map(_mean, found)]


def _tasks(study: Study) -> list[str]:
    """Return the table of synthetic tasks: a row an arm, a column a task and tested length."""
    columns = [(name, times * task.tokens) for name, task in study.tasks.items() for times in task.lengths]
    if not columns:
        return []
    rows = []
    for size in study.sizes:
        for arm in study.arms:
            found = [_answer(study, Cell("task", size, arm, 0, None, name), tokens) for name, tokens in columns]
            if any(found):
                rows.append([_label(arm, size), *found])
    head = ["task, tokens", *(f"{name}, {tokens:,}" for name, tokens in columns)]
    return ["Right answers in percent, and for n-grams nats above the best possible:", "", *markdown_table(head, rows)]


def _answer(study: Study, cell: Cell, tokens: int) -> str:
    result = read_result(study, cell)
    answer = result.answers.get(str(tokens)) if result is not None else None
    if not answer:
        return ""
    if answer[1] is None:
        return "diverged"
    return f"{answer[1]:.3f}" if study.tasks[cell.task].kind == "ngrams" else f"{100 * answer[0]:.1f}"


def _notes(study: Study, rows: Sequence[Row]) -> list[str]:
    edge = [
        row.label
        for row in rows
        if len(lrs := searched_lrs(study, row.arm)) > 1 and row.first.lr in (min(lrs), max(lrs))
    ]
    notes = [
        "Losses are in nats a token of held-out text, means over seeds ± half the 95% confidence interval where there "
        f"are several; the difference from {study.reference} is over the seeds that both have, as is the share of its "
        "tokens after which the loss that it ends with was reached. The columns of numbers "
        "are the loss of the same tokens by tokens of context. The largest gradient is a multiple of the median norm "
        "in the hundred steps before it."
    ]
    if edge:
        notes += ["", f"The best learning rate is at the edge of those searched: {', '.join(edge)}."]
    return notes


def _cells_of(study: Study, row: Row, rows: Sequence[Row]) -> list[str]:
    results, first = row.results, row.first
    reference = next((other.results for other in rows if (other.size, other.arm) == (row.size, study.reference)), {})
    shared = [results[seed].loss - reference[seed].loss for seed in results if seed in reference]  # type: ignore[operator]
    gradients = [result.largest_gradient[0] for result in results.values() if result.largest_gradient]
    cells_ = [row.label, f"{first.body_parameters:,}", f"{first.tokens:,}", f"{first.lr:g}"]
    cells_ += [str(Mean.of([result.loss for result in results.values()]))]  # type: ignore[misc]
    cells_ += ["" if row.arm == study.reference else _mean(shared)]
    reached = [share_of_tokens(results[seed], reference[seed]) for seed in results if seed in reference]
    cells_ += ["" if row.arm == study.reference or None in reached else _mean([share for share in reached if share])]
    for context in study.contexts:
        cells_.append(_mean([r.contexts[str(context)] for r in results.values() if str(context) in r.contexts]))
    speed = statistics.median(result.tokens_per_second for result in results.values())
    return [*cells_, f"{first.state_bytes:,}", f"{speed:,.0f}", f"{max(gradients):.1f}" if gradients else ""]


def share_of_tokens(run: Result, reference: Result) -> float | None:
    """Return with which share of the reference's tokens a run first had the loss that the reference ends with.

    Between two evaluations the loss is taken to fall evenly. None is a run that never had it.
    """
    if reference.loss is None or not reference.tokens:
        return None
    before: tuple[float, float] | None = None
    for _, tokens, loss in run.validation:
        if loss <= reference.loss:
            back = 0.0 if before is None else (reference.loss - loss) / (before[1] - loss) * (tokens - before[0])
            return float((tokens - back) / reference.tokens)
        before = tokens, loss
    return None


def _mean(values: Sequence[float]) -> str:
    return str(Mean.of(values)) if values else ""


def _label(arm: str, size: str) -> str:
    return f"{arm} {size}".strip()


def _as_json(study: Study, rows: Sequence[Row]) -> dict[str, object]:
    searched = [
        {"size": cell.size, "arm": cell.arm, "lr": result.lr, "loss": result.loss}
        for cell in cells(study)
        if cell.kind == "search" and (result := read_result(study, cell)) is not None
    ]
    final = [
        {"size": row.size, "arm": row.arm, "seed": seed, **asdict(result)}
        for row in rows
        for seed, result in row.results.items()
    ]
    tasks = [
        {"size": cell.size, "arm": cell.arm, "task": cell.task, "lr": result.lr, "answers": result.answers}
        for cell in cells(study)
        if cell.kind == "task" and (result := read_result(study, cell)) is not None
    ]
    return {"reference": study.reference, "search": searched, "final": final, "tasks": tasks}


def _curve(label: str, points: Iterable[tuple[float, Mean]]) -> Curve:
    """Return what is plotted of some means, with bands where there are several seeds."""
    return Curve(label, [Point(x, mean.value, *mean.bounds) for x, mean in points])


def _by_lr(search: LrSearch) -> Curve:
    losses = sorted(search.losses.items())
    return Curve(search.label, [Point(lr, loss) for lr, loss in losses if loss is not None])


def _by_context(row: Row) -> Curve:
    contexts = [int(context) for context in row.first.contexts]
    found = row.results.values()
    return _curve(row.label, [(n, Mean.of([result.contexts[str(n)] for result in found])) for n in contexts])


def _by_tokens(row: Row, flops: float = 1.0) -> Curve:
    steps = [entry[1] for entry in row.first.validation]
    losses = [[entry[2] for entry in result.validation] for result in row.results.values()]
    return _curve(row.label, [(n * flops, Mean.of(values)) for n, *values in zip(steps, *losses, strict=False)])


def _by_flops(row: Row) -> Curve:
    return _by_tokens(row, row.first.flops_per_token)


PLOTS: dict[str, tuple[str, Literal[2, 10], Callable[[Row], Curve]]] = {  # of final runs: what is on their x axes
    "loss-by-context": (CONTEXT, 2, _by_context),
    "loss-by-tokens": (TRAINED_TOKENS, 10, _by_tokens),
    "loss-by-flops": (TRAINED_FLOPS, 10, _by_flops),
}
