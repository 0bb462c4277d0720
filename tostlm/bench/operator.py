"""The TSSA operator's backends beside the authors' operations, a C x C linear layer and a copy of the same bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.bench.report import begin, now, report, take_turns
from tostlm.device import best_device
from tostlm.files import write_atomically
from tostlm.plots import new_figure, png_bytes, require_matplotlib
from tostlm.tssa import tssa
from tostlm.tssa.reference import EPS, EPS_MASS

AUTHORS, LINEAR, COPY = "authors", "linear", "copy"
FEW_TOKENS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """What is timed: one sequence of `tokens` tokens."""

    width: int
    heads: int
    tokens: int
    dtype: str  # a key of DTYPES


class Timing(NamedTuple):
    """Median seconds of interleaved runs."""

    shape: Shape
    what: str
    forward: float
    both: float  # forward and backward; of a copy, the forward's


def authors(w: Tensor, temp: Tensor) -> Tensor:
    """The operations of the authors' release in fp32, over [B, H, T, D] by torch.cumsum (arXiv 2412.17810)."""
    B, T, C = w.shape
    H = temp.shape[0]
    x = w.float().view(B, T, H, C // H).transpose(1, 2)
    square = x**2
    normed = square / square.cumsum(-2).clamp_min(EPS)
    Pi = torch.softmax(normed.sum(-1) * temp[:, None], dim=1)  # [B, H, T]
    dots = (square * Pi[..., None]).cumsum(-2) / (Pi.cumsum(-1) + EPS_MASS)[..., None]
    y = -(x * Pi[..., None]) / (1 + dots)
    return y.transpose(1, 2).reshape(B, T, C).to(w.dtype)


def report_operator(
    shapes: Sequence[Shape], backends: Sequence[str], repeats: int, threads: int, out: Path | None
) -> str:
    """Time every backend and its peers on every shape, and return the table of their speeds.

    They take turns, run by run, after one that warms up. Each turn begins with a few tokens that are not timed: what is
    timed finds its code at hand, and its data where the others left it.

    Args:
        backends: their names; none for those that run here.
        out: path of the files to write too, with the suffixes .json, .txt and .png.

    Raises:
        UserError: `out` cannot be written.
        ValueError: a backend is not known or does not run here.
    """
    begin(threads, out)
    if out:
        require_matplotlib()
    device = best_device()
    backends = backends or ["torch", "triton" if device.type == "cuda" else "cpp"]
    timings = []
    for shape in shapes:
        contestants = {name: _contestant(name, shape, device) for name in (AUTHORS, *backends, LINEAR, COPY)}
        few = {name: _contestant(name, shape._replace(tokens=FEW_TOKENS), device) for name in contestants}
        runs = {name: partial(_time_after, few[name], run) for name, run in contestants.items()}
        for name, timed in take_turns(runs, repeats).items():
            timings.append(Timing(shape, name, *map(statistics.median, zip(*timed, strict=True))))
    rows = [{**timing._asdict(), "shape": timing.shape._asdict()} for timing in timings]
    text = report(table(timings, backends), device, out and out.with_suffix(".json"), timings=rows)
    if out:
        write_atomically(out.with_suffix(".txt"), text + "\n")
        write_atomically(out.with_suffix(".png"), _plot(timings, backends))
    return text


def _time_after(few: Callable[[], object], run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    few()
    return run()


def _contestant(name: str, shape: Shape, device: torch.device) -> Callable[[], tuple[float, float]]:
    """Return a function that runs `name` once and returns seconds of its forward pass, and of both passes."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[shape.dtype]
    w, g = (torch.randn(1, shape.tokens, shape.width, generator=generator).to(device, dtype) for _ in range(2))
    temp = torch.ones(shape.heads, device=device, requires_grad=True)
    matrix = torch.randn(shape.width, shape.width, generator=generator).to(device, dtype).requires_grad_()
    w.requires_grad_(name != COPY)
    function: Callable[[], Tensor] = {
        AUTHORS: lambda: authors(w, temp),
        LINEAR: lambda: F.linear(w, matrix),
        COPY: lambda: w.clone(),
    }.get(name, lambda: tssa(w, temp, backend=name)[0])

    def run() -> tuple[float, float]:
        w.grad = temp.grad = matrix.grad = None
        start = now(device)
        y = function()
        middle = now(device)
        if name != COPY:
            y.backward(g)
        return middle - start, now(device) - start

    return run


COLUMNS = ("width", "heads", "tokens", "dtype", "backend")
FIGURES = ("authors/own fwd", "authors/own both", "own/linear fwd", "own/linear both", "own/copy fwd", "ns/token both")


def table(timings: Sequence[Timing], backends: Sequence[str]) -> str:
    """For each shape and backend: the authors' operations over it, its own over a linear and a copy, and its time."""
    lines = ["".join(f"{name:>9}" for name in COLUMNS) + "".join(f"{name:>18}" for name in FIGURES)]
    found = {(timing.shape, timing.what): timing for timing in timings}
    for shape in dict.fromkeys(timing.shape for timing in timings):
        peer, linear, copy = (found[shape, name] for name in (AUTHORS, LINEAR, COPY))
        for name in backends:
            own = found[shape, name]
            figures = (
                peer.forward / own.forward,
                peer.both / own.both,
                own.forward / linear.forward,
                own.both / linear.both,
                own.forward / copy.forward,
                own.both / shape.tokens * 1e9,
            )
            cells = "".join(f"{cell:>9}" for cell in (*shape, name))
            lines.append(cells + "".join(f"{figure:>18.4g}" for figure in figures))
    return "\n".join(lines)


def _plot(timings: Sequence[Timing], backends: Sequence[str]) -> bytes:
    """Nanoseconds a token, forward and backward, by tokens: a panel for each width and dtype. PNG."""
    panels = list(dict.fromkeys((t.shape.width, t.shape.dtype) for t in timings))
    figure = new_figure(4 * len(panels), 4)
    (axes,) = figure.subplots(1, len(panels), squeeze=False)
    for panel, (width, dtype) in zip(axes, panels, strict=True):
        for name in (AUTHORS, *backends, LINEAR):
            chosen = [t for t in timings if (t.shape.width, t.shape.dtype, t.what) == (width, dtype, name)]
            per_token = [t.both / t.shape.tokens * 1e9 for t in chosen]
            panel.plot([t.shape.tokens for t in chosen], per_token, marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=f"{width} channels, {dtype}")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("ns a token, forward and backward")
    axes[0].legend()
    return png_bytes(figure)
