"""What the layers of a model do at each position of long documents: memberships, gates, how far they remember."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from tostlm.checkpoint import load_checkpoint, run_folder
from tostlm.data import VALIDATION, TokenSet, evenly_spread
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.eval.text import require_tokenizer
from tostlm.eval.token_scores import PASS_TOKENS
from tostlm.files import require_writable, write_atomically
from tostlm.model import LM, layer_statistics

FILE = "layers.json"


def measure_layers(
    path: Path,
    data: Path | None,
    contexts: Sequence[int],
    documents: int,
    out: Path | None,
    device: torch.device | None = None,
) -> str:
    """Read held-out documents from their start, write what the layers say by position to layers.json, return its table.

    Args:
        path: a checkpoint, or the folder of a run for its newest one.
        data: a prepared folder; None is that of the checkpoint's run, of a blend the first one.
        contexts: the bounds of the positions over which means are taken, ascending.
        documents: that are read, evenly spread over those that are long enough.
        out: folder of layers.json; None is the run's.

    Raises:
        UserError: the text was prepared with another tokenizer, no document is long enough, or positions are too few.
    """
    checkpoint = load_checkpoint(path, device or best_device())
    tokens, longest = TokenSet(data or checkpoint.config.data.folders[0], VALIDATION), max(contexts)
    out = out or run_folder(checkpoint.path)
    require_writable(out)
    require_tokenizer(tokens, checkpoint.tokenizer, path)
    positions = checkpoint.config.model.positions
    if positions is not None and longest > positions:
        raise UserError(f"--contexts {longest} is beyond the {positions} positions of {path}; use fewer")
    starts = [first for first, stop in tokens.document_bounds.tolist() if stop - first >= longest]
    if not starts:
        raise UserError(f"no held-out document of {tokens.folder} has {longest:,} tokens; use shorter --contexts")
    found: dict[str, list[list[float]]] = defaultdict(list)
    for start in evenly_spread(starts, documents):
        row = torch.from_numpy(tokens.read(start, start + longest)).to(checkpoint.lm.embed.weight.device)
        for name, values in statistics_by_position(checkpoint.lm, row, contexts).items():
            found[name].append(values)
    if not all(math.isfinite(value) for of_name in found.values() for values in of_name for value in values):
        raise UserError(f"{path}: its activations are not finite; the model has diverged")
    means = {name: torch.tensor(values).mean(0).tolist() for name, values in sorted(found.items(), key=_order)}
    content = {"checkpoint": str(checkpoint.path), "data": str(tokens.folder), "positions": list(contexts)}
    write_atomically(out / FILE, json.dumps({**content, "statistics": means}, indent=2) + "\n")
    return layers_table(means, contexts) + f"\nwritten to {out / FILE}"


@torch.no_grad()
def statistics_by_position(lm: LM, row: torch.Tensor, bounds: Sequence[int]) -> dict[str, list[float]]:
    """Return the means of the layers' statistics over the tokens of a row [T] between each two bounds, from 0 on."""
    found: dict[str, list[float]] = defaultdict(list)
    state = None
    with layer_statistics(list(lm.blocks)) as statistics:
        for start, end in pairwise([0, *bounds]):
            sums: dict[str, float] = defaultdict(float)
            for piece in row[start:end].split(PASS_TOKENS):
                _, state = lm.hidden(piece[None], state)
                for name, value in statistics.items():
                    sums[name] += float(value) * len(piece) / (end - start)
            for name, total in sums.items():
                found[name].append(total)
    return found


def _order(item: tuple[str, object]) -> tuple[str, int]:
    name, layer = item[0].rsplit("/", 1)
    return name, int(layer)


def layers_table(means: dict[str, list[float]], bounds: Sequence[int]) -> str:
    """Return a table of statistics by name and layer, at positions up to each bound."""
    lines = [f"{'positions up to':>24}" + "".join(f"{bound:>12,}" for bound in bounds)]
    lines += [f"{name:>24}" + "".join(f"{value:>12.4g}" for value in values) for name, values in means.items()]
    return "\n".join(lines)
