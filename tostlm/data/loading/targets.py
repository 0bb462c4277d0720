"""Which held-out tokens are scored at several context lengths: the same at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tostlm.data.loading.token_set import TokenSet
from tostlm.errors import UserError


class Targets(NamedTuple):
    """The scored tokens: in each window the `span` tokens that end before `ends`."""

    ends: list[int]  # index of the token after the last target, in the token set
    span: int


def choose_targets(tokens: TokenSet, contexts: Sequence[int], windows: int) -> Targets:
    """Choose spans of targets, evenly spread over the documents that are longer than the longest context to be scored.

    There are `windows` spans, or as many as fit. Each is half the shortest context long, so every target is predicted
    from at least half of the context it is scored at.

    Raises:
        UserError: no document is long enough.
    """
    longest, span = max(contexts), max(1, min(contexts) // 2)
    bounds = tokens.document_bounds
    ends = [end for first, stop in bounds.tolist() for end in range(first + longest + 1, stop + 1, span)]
    if not ends:
        lengths = np.diff(bounds)
        longer = ", ".join(f"{int((lengths > context).sum()):,} than {context:,}" for context in sorted(contexts))
        raise UserError(
            f"no held-out document of {tokens.folder} is longer than {longest} tokens (the longest has "
            f"{lengths.max()}; longer are {longer}); ask for shorter contexts or hold out more documents"
        )
    return Targets(evenly_spread(ends, windows), span)


def evenly_spread(values: Sequence[int], count: int) -> list[int]:
    """Return `count` of the values, or all where there are fewer, evenly spread over them."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))
    return [values[index] for index in chosen]
