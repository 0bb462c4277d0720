"""Plots as PNG files, by matplotlib, which the extra `eval` installs."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from tostlm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure.savefig(image, format="png", dpi=dots_per_inch)
    return image.getvalue()
