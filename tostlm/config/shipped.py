"""The configs that come with the package: found by name, wherever it is installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from tostlm.config.sections import nearest
from tostlm.errors import UserError

FOLDER = Path(str(files("tostlm"))) / "configs"  # in a checkout a link to configs/, in a wheel the files themselves


class ShippedConfig(NamedTuple):
    """A config of the package.

    Attributes:
        name: what commands take for it, as in `tostlm train NAME`.
        path: its YAML file.
        summary: the first line of the comment that the file begins with.
    """

    name: str
    path: Path
    summary: str


def shipped_configs() -> list[ShippedConfig]:
    """Return the configs of the package, sorted by name."""
    return [
        ShippedConfig(path.stem, path, path.read_text().splitlines()[0].removeprefix("# "))
        for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)
    ]


def find_config(path: Path) -> Path:
    """Return the file that a command's CONFIG argument means.

    Args:
        path: a file, which wins where it exists, or the name of a shipped config.

    Raises:
        UserError: it is neither.
    """
    if path.exists():
        return path
    shipped = {config.name: config.path for config in shipped_configs()}
    if str(path) in shipped:
        return shipped[str(path)]
    close = nearest(path.stem, shipped)
    raise UserError(f"config {path} is neither a file nor a shipped config{close}; `tostlm config list` shows them")
