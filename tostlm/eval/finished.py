"""What an evaluation has measured so far, in a file: the same command continues from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tostlm.eval.perplexity import Totals
from tostlm.files import read_json_object, write_atomically

FILE = "perplexity.partial.json"


class Finished:
    """Sums by what they are of; those that another command, or other files, have left are not taken.

    Args:
        folder: of the report; None keeps nothing, as on ranks that do not write.
        command: all that determines the sums, beside what they are of.
    """

    def __init__(self, folder: Path | None, command: str) -> None:
        self._path = None if folder is None else folder / FILE
        self._content: dict[str, object] = {"command": command}
        self._found: dict[str, list[dict[str, list[Any]]]] = {}
        if self._path is not None and self._path.exists():
            content = read_json_object(self._path.read_bytes())
            if content is not None and content.get("command") == command and isinstance(content.get("found"), dict):
                self._found = content["found"]

    def get(self, name: str, documents: int) -> list[Totals] | None:
        """Return the sums of a name, one a context; None where they are not finished."""
        found = []
        try:
            for sums in self._found[name]:
                totals, places = Totals.zeros(documents), np.array(sums["documents"], int)
                for field, array in zip(Totals._fields, totals, strict=True):
                    array[places] = sums[field]
                found.append(totals)
        except (KeyError, IndexError, TypeError, ValueError):  # not there, or the file was changed
            return None
        return found if all(np.isfinite(totals).all() for totals in found) else None

    def put(self, name: str, found: Sequence[Totals]) -> None:
        """Keep the sums of a name."""
        if self._path is None:
            return
        self._found[name] = []
        for totals in found:
            places = np.flatnonzero(totals.tokens)
            sums = {field: array[places].tolist() for field, array in zip(Totals._fields, totals, strict=True)}
            self._found[name].append({"documents": places.tolist(), **sums})
        write_atomically(self._path, json.dumps({**self._content, "found": self._found}))

    def forget(self) -> None:
        """Remove the file, as the report has all of it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
