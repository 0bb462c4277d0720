"""A page about models, of what was measured of them: HTML that needs nothing beside it, plots, and Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from tostlm.eval.chapters import Chapter, Findings, chapters
from tostlm.eval.report import escaped, markdown_table
from tostlm.eval.summary import read_answers, read_decode_file, read_runs, read_scores
from tostlm.files import require_writable, write_atomically
from tostlm.plots import draw_panels, require_matplotlib

NAMED = 3  # models that a title names


def write_page(paths: Sequence[Path], out: Path | None, decode: Path | None, title: str | None) -> Path:
    """Write report.html, its plots as PNG files and report.md, of what the folders of runs hold; return the page.

    Args:
        paths: runs, or checkpoints in them.
        out: folder of the page; None: the first run's.
        decode: a file that `tostlm bench decode` wrote.
        title: of the page; None names the models.

    Raises:
        UserError: a folder is no run, a file is damaged, `out` cannot be written, or matplotlib is missing.
    """
    require_matplotlib()
    found = read_findings(paths, decode)
    runs = found.runs
    out = out or runs[0].folder
    require_writable(out)
    title = title or (", ".join(run.name for run in runs) if len(runs) <= NAMED else f"{len(runs)} models")
    written = list(chapters(found))
    plots = write_plots(written, out)
    write_atomically(out / "report.md", f"# {escaped(title)}\n\n{markdown(written)}")
    write_atomically(out / "report.html", _html(title, written, plots))
    return out / "report.html"


def read_findings(paths: Sequence[Path], decode: Path | None = None) -> Findings:
    """Return what the folders of runs hold; arguments and errors as of `write_page`."""
    runs = read_runs(paths)
    speeds = None if decode is None else read_decode_file(decode)
    return Findings(runs, read_scores(runs), read_answers(runs), speeds)


def write_plots(written: Sequence[Chapter], folder: Path) -> dict[str, bytes]:
    """Write the plots of chapters to a folder, under the names that `markdown` has, and return them by anchor."""
    plots = {chapter.anchor: draw_panels(chapter.panels) for chapter in written if chapter.panels}
    for anchor, plot in plots.items():
        write_atomically(folder / plot_name(anchor), plot)
    return plots


def plot_name(anchor: str) -> str:
    """Return the name of the file of a chapter's plot."""
    return f"report-{anchor}.png"


def _html(title: str, written: Sequence[Chapter], plots: dict[str, bytes]) -> str:
    images = {anchor: f"data:image/png;base64,{base64.b64encode(plot).decode()}" for anchor, plot in plots.items()}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("tostlm.eval").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(title=title, chapters=written, images=images, describe=description)


def description(chapter: Chapter) -> str:
    """Return what a plot shows, for those who do not see it; the numbers are in the table."""
    axes = "; ".join(dict.fromkeys(f"{panel.ylabel} by {panel.xlabel}" for panel in chapter.panels))
    labels = dict.fromkeys(curve.label for panel in chapter.panels for curve in panel.curves if curve.points)
    return f"{chapter.title}: {axes}, of {', '.join(labels)}. The table has the numbers."


def markdown(written: Sequence[Chapter]) -> str:
    """Return the chapters that have numbers, for a README or a model card."""
    parts = []
    for chapter in written:
        if not chapter.rows:
            continue
        parts += [f"## {chapter.title}", escaped(chapter.about)]
        if chapter.panels:
            parts.append(f"![{chapter.title}]({plot_name(chapter.anchor)})")
        parts += ["\n".join(f"- {escaped(note)}" for note in chapter.notes)] if chapter.notes else []
        parts.append("\n".join(markdown_table(chapter.head, chapter.rows)))
    return "\n\n".join(parts) + "\n"
