"""What a page about models says: a chapter for each thing that can be measured, with its plots and its numbers."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tostlm.eval.recall import Answers, ProbedModel
from tostlm.eval.report import (
    CONTEXT,
    TRAINED_FLOPS,
    TRAINED_TOKENS,
    ModelScores,
    clamping,
    loss_panel,
    scores_panel,
    short_number,
    verdict,
)
from tostlm.eval.summary import DecodeFile, DecodeSpeed, RunSummary
from tostlm.files import format_bytes
from tostlm.model import count_body_parameters, count_parameters, perplexity, state_bytes
from tostlm.plots import Curve, Panel, Point

STATE_CONTEXTS = [1 << power for power in range(9, 21)]  # 512 tokens to 1M
NONE = "-"  # in a cell


class Chapter(NamedTuple):
    """A part of the page; without rows its inputs are missing, and `command` writes them."""

    anchor: str  # of links to it, and in the names of its files
    title: str
    about: str  # what is plotted, in a sentence
    command: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    panels: Sequence[Panel] = ()
    notes: Sequence[str] = ()


class Findings(NamedTuple):
    """All that is known of some models."""

    runs: Sequence[RunSummary]
    scores: dict[str, list[ModelScores]]  # by protocol
    answers: Sequence[ProbedModel]
    decode: DecodeFile | None

    @property
    def colors(self) -> dict[str, int]:
        """The color of each model, the same in every plot, by its name."""
        names = [run.name for run in self.runs]
        names += [model.name for models in self.scores.values() for model in models]
        names += [model.name for model in self.answers]
        names += [speed.model for speed in (self.decode.decode if self.decode else ())]
        return {name: number for number, name in enumerate(dict.fromkeys(names))}


def chapters(found: Findings) -> Iterator[Chapter]:
    """Yield the chapters of the page in their order."""
    folders = shlex.join(dict.fromkeys(str(run.folder) for run in found.runs))
    stream = shlex.quote(str(found.runs[0].folder / "stream"))
    yield _models(found.runs)
    yield _losses(
        found,
        "same-targets",
        Chapter(
            "context",
            "Loss by context",
            "The mean loss of the same held-out tokens, read with more and more text before them. Bands and ± are "
            "95% confidence intervals over documents; perplexity is in parentheses.",
            f"tostlm eval perplexity {folders}",
        ),
    )
    yield _losses(
        found,
        "stream",
        Chapter(
            "position",
            "Loss by position",
            "The mean loss of held-out tokens by how many tokens of their document are before them, up to each "
            "number, when documents are read from their start. Each number has tokens of its own.",
            f"tostlm eval perplexity {folders} --protocol stream --out {stream}",
        ),
    )
    if "windows" in found.scores:
        about = "The mean loss of all held-out tokens in disjoint windows of each length, as papers report it."
        yield _losses(found, "windows", Chapter("windows", "Loss of windows", about, ""))
    yield _validation(found)
    yield _recall(found, f"tostlm eval recall {folders}")
    yield _state(found)
    yield _decoding(found)


def _models(runs: Sequence[RunSummary]) -> Chapter:
    about = "What each model is, what it was trained on and how fast. Parameters are without learned positions."
    columns = [_facts(run) for run in runs]
    rows = [[fact, *(column[fact] for column in columns)] for fact in columns[0]]
    return Chapter("models", "Models", about, "", ["", *(run.name for run in runs)], rows)


def _facts(run: RunSummary) -> dict[str, str]:
    config, model = run.config, run.config.model
    mixers = Counter(options.mixer for options in model.layer_plan)
    context = config.data.context_tokens
    return {
        "Parameters": f"{count_parameters(model):,}",
        "Parameters in blocks": f"{count_body_parameters(model):,}",
        "Layers": ", ".join(f"{count} {mixer}" for mixer, count in mixers.items()),
        "Width, heads": f"{model.width:,}, {model.heads}",
        "Vocabulary": f"{model.vocab_size:,}",
        "Positions": f"{model.positions:,} learned" if model.positions else "unlimited",
        "Training data": ", ".join(folder.name for folder in config.data.folders),
        "Training tokens": f"{run.tokens:,}",
        "Steps": f"{run.step:,} of {config.train.steps:,}",
        "Batch": f"{config.train.batch_tokens:,} tokens",
        "Context in training": f"{context:,} tokens",
        "Optimizer": config.optimizer.name,
        "Learning rate": f"{config.optimizer.lr:g}",
        "Training speed": NONE if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f} tokens/s",
        "State at that context": format_bytes(state_bytes(model, context)),
    }


def _losses(found: Findings, protocol: str, chapter: Chapter) -> Chapter:
    """Return a chapter on the scores of one protocol."""
    models = found.scores.get(protocol, [])
    if not models:
        return chapter
    several = len({model.data for model in models}) > 1
    head = [f"{model.name}, {model.data}" if several else model.name for model in models]
    contexts = sorted({score.context for model in models for score in model.scores})
    rows = [[f"{context:,}", *(_loss_at(model, context) for model in models)] for context in contexts]
    notes = [verdict(model) + (f" ({model.data})" if several else "") for model in models if model.gains]
    notes += dict.fromkeys(clamping(model.name, model.clamped) for model in models if model.clamped)
    return chapter._replace(
        head=["tokens", *head], rows=rows, notes=notes, panels=[scores_panel(models, protocol, found.colors)]
    )


def _loss_at(model: ModelScores, context: int) -> str:
    for score in model.scores:
        if score.context == context:
            low, high = score.low, score.high
            error = "" if low is None or high is None else f" ± {(high - low) / 2:.4f}"
            return f"{score.nats:.4f}{error} ({short_number(score.perplexity)})"
    return NONE


def _validation(found: Findings) -> Chapter:
    about = "The loss on held-out text while a model trained, by the tokens and by the computation it took."
    chapter = Chapter("training", "Loss in training", about, "tostlm train CONFIG")
    runs = [run for run in found.runs if run.validation]
    if not runs:
        return chapter
    head = ["model", "evaluations", "tokens", "FLOPs", "last loss", "perplexity", "lowest loss", "at tokens"]
    rows, by_tokens, by_flops = [], [], []
    for run in runs:
        last, best = run.validation[-1], min(run.validation, key=lambda each: each.loss)
        cells = [f"{len(run.validation):,}", f"{last.tokens:,}", f"{last.flops:.3g}", f"{last.loss:.4f}"]
        cells += [f"{short_number(perplexity(last.loss))}", f"{best.loss:.4f}", f"{best.tokens:,}"]
        rows.append([run.name, *cells])
        color = found.colors[run.name]
        by_tokens.append(Curve(run.name, [Point(each.tokens, each.loss) for each in run.validation], color))
        by_flops.append(Curve(run.name, [Point(each.flops, each.loss) for each in run.validation], color))
    panels = [loss_panel(TRAINED_TOKENS, by_tokens, 10), loss_panel(TRAINED_FLOPS, by_flops, 10)]
    return chapter._replace(head=head, rows=rows, panels=panels)


def _recall(found: Findings, command: str) -> Chapter:
    about = (
        "What models bring back from their context, by its length: the loss of tokens that nothing but the context "
        "says, below what the same tokens cost where they stand for the first time (above), and of Markov chains the "
        "loss above the best possible. A line for each number of pairs. Tables have the share of right answers too."
    )
    chapter = Chapter("recall", "Recall", about, command)
    cases = list(dict.fromkeys((r.task, r.load, r.tokens) for model in found.answers for r in model.results))
    if not cases:
        return chapter
    cases.sort(key=lambda case: (case[1] is None, case[0], case[1] or 0, case[2]))
    panels = [_task_panel(task, found) for task in dict.fromkeys(task for task, *_ in cases)]
    head = ["task", "pairs", "tokens", *(model.name for model in found.answers)]
    notes = [clamping(model.name, model.clamped) for model in found.answers if model.clamped]
    rows = [_answer_row(case, found.answers) for case in cases]
    return chapter._replace(head=head, rows=rows, panels=panels, notes=notes)


def _answer_row(case: tuple[str, int | None, int], models: Sequence[ProbedModel]) -> list[str]:
    task, load, tokens = case
    found = [next((r for r in m.results if (r.task, r.load, r.tokens) == case), None) for m in models]
    return [task, NONE if load is None else f"{load:,}", f"{tokens:,}", *map(_answers, found)]


def _answers(found: Answers | None) -> str:
    if found is None:
        return NONE
    beside = f"best {found.best_nats:.2f}" if found.first_nats is None else f"first {found.first_nats:.2f}"
    return f"{found.accuracy:.1%}, {found.nats:.2f} nats ({beside})"


def _task_panel(task: str, found: Findings) -> Panel:
    """Return the plot of one task: a color for each model and a style for each load, or of one model a color a load."""
    loads = sorted({r.load for model in found.answers for r in model.results if r.load is not None})
    curves, alone = [], len(found.answers) == 1
    for model in found.answers:
        mine = [result for result in model.results if result.task == task]
        for load in dict.fromkeys(result.load for result in mine):
            points = sorted(Point(r.tokens, _gained(r)) for r in mine if r.load == load)
            number = 0 if load is None else loads.index(load)
            label = model.name if load is None else f"{load} pairs" if alone else f"{model.name}, {load} pairs"
            color, style = (number, 0) if alone else (found.colors[model.name], number)
            curves.append(Curve(label, points, color, style))
    of_chain = any(r.first_nats is None for model in found.answers for r in model.results if r.task == task)
    return Panel("tokens", "nats above the best" if of_chain else "nats gained by having read it", curves, task)


def _gained(found: Answers) -> float:
    return found.nats - found.best_nats if found.first_nats is None else found.first_nats - found.nats


def _state(found: Findings) -> Chapter:
    """Return a chapter that follows from the configs alone."""
    about = (
        "What a model keeps of one sequence while it writes, by the tokens read so far, in fp32. It follows from the "
        "config; models of learned positions end at these."
    )
    points = {run.name: [Point(n, state_bytes(run.config.model, n)) for n in _contexts(run)] for run in found.runs}
    curves = [Curve(name, own, found.colors[name]) for name, own in points.items()]
    sizes = [{point.x: format_bytes(point.y) for point in own} for own in points.values()]
    rows = [[f"{n:,}", *(own.get(n, NONE) for own in sizes)] for n in STATE_CONTEXTS]
    panel = Panel(CONTEXT, "bytes a sequence", curves, log_y=True)
    return Chapter("state", "State", about, "", ["tokens", *points], rows, [panel])


def _contexts(run: RunSummary) -> list[int]:
    positions = run.config.model.positions
    return [n for n in STATE_CONTEXTS if positions is None or n <= positions]


def _decoding(found: Findings) -> Chapter:
    chapter = Chapter(
        "decoding",
        "Decoding",
        "How many tokens of one sequence a model writes in a second after so many tokens, and reads before that.",
        "tostlm bench decode --out decode.json, and then this page with --decode decode.json",
    )
    if found.decode is None or not found.decode.decode:
        return chapter
    speeds = found.decode.decode
    written = [_speed_curve(found, name, lambda s: 1000 / s.milliseconds) for name in _speed_names(speeds)]
    read = [_speed_curve(found, name, lambda s: s.prefill_tokens_per_second) for name in _speed_names(speeds)]
    panels = [Panel(CONTEXT, "tokens/s", written, "Writing", limits=(0, None))]
    if any(curve.points for curve in read):
        panels.append(Panel(CONTEXT, "tokens/s", read, "Reading", limits=(0, None)))
    return chapter._replace(
        about=f"{chapter.about} Measured on {found.decode.machine}.",
        head=["model", "context", "ms a token", "tokens/s", "read tokens/s", "state"],
        rows=[_speed_row(speed) for speed in speeds],
        panels=panels,
    )


def _speed_names(speeds: Sequence[DecodeSpeed]) -> list[str]:
    return list(dict.fromkeys(speed.model for speed in speeds))


def _speed_curve(found: Findings, name: str, value: Callable[[DecodeSpeed], float | None]) -> Curve:
    mine = [speed for speed in (found.decode.decode if found.decode else ()) if speed.model == name]
    points = [Point(speed.context, y) for speed in mine if (y := value(speed)) is not None]
    return Curve(name, sorted(points), found.colors[name])


def _speed_row(speed: DecodeSpeed) -> list[str]:
    read, state = speed.prefill_tokens_per_second, speed.state_bytes
    return [
        speed.model,
        f"{speed.context:,}",
        f"{speed.milliseconds:.2f}",
        f"{1000 / speed.milliseconds:,.0f}",
        NONE if read is None else f"{read:,.0f}",
        NONE if state is None else format_bytes(state),
    ]
