"""Plots as PNG files, by matplotlib, which the extra `eval` installs."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tostlm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TICKS = 12  # on the x axis of a plot, each with its number
MOST_LABELS = 6  # of a legend within a plot; a longer one stands beside it
MOST_MARKERS = 40  # of points on a curve
COLORS = 10  # of matplotlib's cycle
STYLES = ("-", "--", ":", "-.")


LARGEST_EXPONENT = 700  # whose exponential a float holds


class Point(NamedTuple):
    """A measured value, and the bounds of its confidence interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Curve(NamedTuple):
    """Points that a line joins, with a band of their intervals."""

    label: str
    points: Sequence[Point]
    color: int | None = None  # its number among colors; None is the next one
    style: int = 0  # of the line, its number among STYLES


class Panel(NamedTuple):
    """A plot of curves over a logarithmic x axis."""

    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    title: str = ""
    base: Literal[2, 10] = 2  # of the x axis; of few points with base 2 each has its number
    least_span: float = 0.0  # of the y axis, so that noise does not look like a trend
    limits: tuple[float, float | None] | None = None  # of the y axis; None is what the curves take
    log_y: bool = False
    exp_label: str = ""  # of an axis on the right with the exponential of the left one; "" is none


def require_matplotlib() -> None:
    """Check that plots can be drawn, before the work that they would show.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("drawing takes matplotlib, which is not installed; `pip install 'tostlm[eval]'`")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches; raise UserError as `require_matplotlib` does."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png_bytes(figure: Figure, dots_per_inch: int = 150) -> bytes:
    """Return a figure as the content of a PNG file."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of names in other scripts
        figure.savefig(image, format="png", dpi=dots_per_inch)
    return image.getvalue()


def draw_panels(panels: Sequence[Panel], columns: int = 2) -> bytes:
    """Return a PNG of panels, at most `columns` beside each other, with one legend for the curves of all."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    curves = sorted((curve for panel in panels for curve in panel.curves if curve.points), key=_place)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    beside = len(panels) == 1 and len(labels) > MOST_LABELS
    figure = new_figure(9.5 if beside else 7.5 if columns == 1 else 4.75 * columns, 4.5 if rows == 1 else 3.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    lines: dict[str, Any] = {}
    for panel, own in zip(panels, axes, strict=False):
        lines |= _draw(own, panel)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    _add_legend(figure, [lines[label] for label in labels], len(panels), beside)
    return png_bytes(figure)


def _place(curve: Curve) -> tuple[int, int]:
    """Return where a curve comes in a legend; those without colors stay in their order."""
    return curve.color or 0, curve.style


def _add_legend(figure: Figure, lines: Sequence[Any], panels: int, beside: bool) -> None:
    """Add a legend beside a plot or in it; of several panels in the place that they leave free, or below them."""
    if beside:
        figure.legend(handles=lines, fontsize="small", loc="outside right upper")
    elif panels == 1:
        figure.axes[0].legend(handles=lines)
    elif panels < len(figure.axes):
        figure.axes[panels].legend(handles=lines, loc="center")
    else:
        figure.legend(handles=lines, ncols=min(len(lines), 4), loc="outside lower center")


def _draw(axes: Axes, panel: Panel) -> dict[str, Any]:
    """Draw a panel, and return the line of each label."""
    lines = {}
    for curve in panel.curves:
        if not curve.points:
            continue
        x, y = [point.x for point in curve.points], [point.y for point in curve.points]
        color = None if curve.color is None else f"C{curve.color % COLORS}"
        style, marker = STYLES[curve.style % len(STYLES)], "o" if len(x) <= MOST_MARKERS else ""
        (line,) = axes.plot(
            x, y, style, marker=marker, markersize=4, color=color, label=curve.label.replace("$", r"\$")
        )
        low = [point.y if point.low is None else point.low for point in curve.points]
        high = [point.y if point.high is None else point.high for point in curve.points]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        lines[curve.label] = line
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    _set_x(axes, panel)
    _set_y(axes, panel)
    return lines


def _set_x(axes: Axes, panel: Panel) -> None:
    axes.set_xscale("log", base=panel.base)
    axes.tick_params(axis="x", which="minor", labelsize="x-small")
    ticks = sorted({point.x for curve in panel.curves for point in curve.points})
    if panel.base == 2 and 0 < len(ticks) <= MOST_TICKS:
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.minorticks_off()


def _set_y(axes: Axes, panel: Panel) -> None:
    if panel.log_y:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    bottom, top = axes.get_ylim()
    if (rest := (panel.least_span - (top - bottom)) / 2) > 0:
        axes.set_ylim(bottom - rest, top + rest)
    if panel.exp_label and top < LARGEST_EXPONENT:
        import numpy as np

        both = (np.exp, lambda x: np.log(np.maximum(x, 1.0)))
        axes.secondary_yaxis("right", functions=both).set_ylabel(panel.exp_label)


def _short(number: float) -> str:
    """Return a number for an axis: multiples of 1,024 with k, of 1,048,576 with M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= unit and number % unit == 0:
            return f"{number / unit:,.0f}{name}"
    return f"{number:,g}" if number < 1 else f"{number:,.0f}"
