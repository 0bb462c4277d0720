"""What training steps at growing contexts say as a whole: exponents in the context, and which model overtakes which."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tostlm.bench.training import NONE, Rate, table
from tostlm.errors import UserError
from tostlm.files import require_file_writable, write_atomically
from tostlm.plots import Curve, Panel, Point, draw_panels, require_matplotlib

LEAST_CONTEXT = 4096  # from which on exponents are fitted: below, what does not depend on the context counts


class Bench(NamedTuple):
    """A file of `tostlm bench train --out`."""

    path: Path
    machine: str
    rates: list[Rate]

    @property
    def models(self) -> list[str]:
        """The models' names, in order."""
        return list(dict.fromkeys(rate.model for rate in self.rates))

    def finished(self, model: str) -> list[Rate]:
        """Return what was measured of a model, by growing context."""
        own = (rate for rate in self.rates if rate.model == model and rate.tokens_per_second is not None)
        return sorted(own, key=lambda rate: rate.context)


def report_scaling(files: Sequence[Path], out: Path) -> str:
    """Write a Markdown page on some benchmarks, and a plot of each beside it; return the page.

    Args:
        files: of `tostlm bench train --out`.
        out: the page, a .md file; plots have its name and a number.

    Raises:
        UserError: a file is no such benchmark, or nothing can be written.
    """
    if out.suffix != ".md":
        raise UserError(f"--out {out} must be a .md file")
    require_matplotlib()
    require_file_writable(out)
    parts = ["# Training steps at growing contexts"]
    for number, bench in enumerate(map(read_bench, files), 1):
        picture = out.with_name(f"{out.stem}-{number}.png")
        write_atomically(picture, _draw(bench))
        parts.append(_section(bench, picture.name))
    page = "\n\n".join(parts) + "\n"
    write_atomically(out, page)
    return page


def read_bench(path: Path) -> Bench:
    """Return a file of `tostlm bench train --out`; a UserError if it is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Bench(path, str(content["machine"]), [Rate(**rate) for rate in content["rates"]])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of `tostlm bench train --out`") from None


def exponent(rates: Sequence[Rate], cost: Callable[[Rate], float]) -> float | None:
    """Return e where what a sequence of T tokens costs grows as T^e, by least squares over contexts from 4,096 on.

    Args:
        cost: of a token.
    """
    own = [(rate.context, rate.context * cost(rate)) for rate in rates if rate.context >= LEAST_CONTEXT]
    if len(own) < 2:
        return None
    x, y = np.log(np.array(own)).T
    return float(np.polyfit(x, y, 1)[0])


def crossover(first: Sequence[Rate], other: Sequence[Rate]) -> float | None:
    """Return the context from which on one model trains faster than another; None if it does not overtake it.

    Between two contexts the ratio of their speeds is taken as a line in logarithms.
    """
    ratios = [(math.log(context), math.log(ratio)) for context, ratio in _ratios(first, other).items()]
    for (x0, y0), (x1, y1) in pairwise(ratios):
        if y0 < 0 <= y1:
            return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))
    return None


def _ratios(first: Sequence[Rate], other: Sequence[Rate]) -> dict[int, float]:
    """Return how many times as fast one model is as another, by the contexts that both have."""
    speeds = {rate.context: _speed(rate) for rate in other}
    return {rate.context: _speed(rate) / speeds[rate.context] for rate in first if rate.context in speeds}


def _speed(rate: Rate) -> float:
    return rate.tokens_per_second or math.nan


def _section(bench: Bench, picture: str) -> str:
    first, *others = bench.models
    lines = ["| model | time grows as T to the | memory grows as T to the |", "|---|---:|---:|"]
    for model in bench.models:
        own = bench.finished(model)
        time = exponent(own, lambda rate: 1 / _speed(rate))
        memory = exponent(own, lambda rate: (rate.saved_bytes or math.nan) / rate.tokens)
        lines.append(f"| {model} | {_number(time)} | {_number(memory)} |")
    crossings = [_crossing(first, other, bench) for other in others]
    numbers = table(bench.rates)
    return "\n\n".join(
        [f"## {bench.path.stem}", f"{bench.machine}.", f"![{bench.path.stem}]({picture})", f"```\n{numbers}\n```",
         f"Of a sequence of T tokens, from T = {LEAST_CONTEXT:,} on:", "\n".join(lines), *crossings]
    )  # fmt: skip


def _crossing(first: str, other: str, bench: Bench) -> str:
    found = crossover(bench.finished(first), bench.finished(other))
    if found is not None:
        return f"{first} overtakes {other} at {found:,.0f} tokens of context."
    ratios = list(_ratios(bench.finished(first), bench.finished(other)).values())
    if not ratios:
        return f"{first} and {other} have no context in common."
    return f"{first} is {'faster' if ratios[-1] >= 1 else 'slower'} than {other} at every context."


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _draw(bench: Bench) -> bytes:
    def curves(of: Callable[[Rate], float]) -> list[Curve]:
        return [
            Curve(model, [Point(rate.context, of(rate)) for rate in bench.finished(model)]) for model in bench.models
        ]

    speed = curves(_speed)
    memory = curves(lambda rate: (rate.peak_bytes or math.nan) / (1 << 30))
    context = "context in tokens"
    return draw_panels(
        [Panel(context, "tokens a second", speed, log_y=True), Panel(context, "GiB at the peak", memory, log_y=True)]
    )
