"""How much better a model predicts rare words that it has read before, by how long ago it has read them.

A rare word here is a pair of tokens, of which the second is the target: single tokens of a small vocabulary are seldom
rare.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from tostlm.data import TokenSet, evenly_spread
from tostlm.eval.models import ScoredModel
from tostlm.eval.token_scores import PASS_TOKENS

RARE = 5  # times at most that a rare pair stands in the training text
COUNTED_TOKENS = 50_000_000  # of the training text
DISTANCES = (0, 64, 1024, 8192)  # tokens, the bounds of what is reported together


def loss_by_repetition(
    model: ScoredModel, tokens: TokenSet, training: TokenSet, window: int = 8192, windows: int = 16
) -> dict[str, list[float]]:
    """Return mean loss in nats and number of the targets of rare pairs, by how far back the pair was read last.

    Read are the first `window` tokens of up to `windows` documents that are as long, evenly spread; fewer tokens where
    the model's positions end. The key "first" is of pairs that the window has not had before, "1-64" of those read 1
    to 64 tokens earlier, and so on. It is empty where no document is long enough.
    """
    length = min(window, model.positions or window)
    starts = [first for first, stop in tokens.document_bounds.tolist() if stop - first > length]
    if not starts:
        return {}
    rows = np.stack([tokens.read(start, start + length + 1) for start in evenly_spread(starts, windows)])
    pairs = rows[:, :-1] * tokens.manifest.vocab_size + rows[:, 1:]  # of the token at hand and its target
    rare = _counts(pairs, training) <= RARE
    distances = np.stack([_distances(row) for row in pairs])
    losses = np.stack([_losses(model, row) for row in rows])
    found = {"first": rare & (distances == 0)}
    for low, high in pairwise(DISTANCES):
        found[f"{low + 1}-{high}"] = rare & (distances > low) & (distances <= high)
    return {name: [float(losses[mask].mean()), int(mask.sum())] for name, mask in found.items() if mask.any()}


def _counts(pairs: np.ndarray, training: TokenSet) -> np.ndarray:
    """Return how often each pair stands in the first `COUNTED_TOKENS` of the training text."""
    kinds, inverse = np.unique(pairs, return_inverse=True)
    counts = np.zeros(len(kinds) + 1, np.int64)
    length, piece = min(len(training), COUNTED_TOKENS), 1 << 22
    for start in range(0, length - 1, piece):
        read = training.read(start, min(start + piece + 1, length))
        codes = read[:-1] * training.manifest.vocab_size + read[1:]
        place = np.searchsorted(kinds, codes)
        known = kinds[np.minimum(place, len(kinds) - 1)] == codes
        counts += np.bincount(np.where(known, place, len(kinds)), minlength=len(kinds) + 1)
    result: np.ndarray = counts[inverse].reshape(pairs.shape)
    return result


def _distances(pairs: np.ndarray) -> np.ndarray:
    """Return how many places before each pair [T] the same pair stands, 0 where it does not."""
    order = np.argsort(pairs, kind="stable")
    distances = np.zeros(len(pairs), np.int64)
    same = pairs[order[1:]] == pairs[order[:-1]]
    distances[order[1:][same]] = (order[1:] - order[:-1])[same]
    return distances


def _losses(model: ScoredModel, row: np.ndarray) -> np.ndarray:
    """Return the loss in nats of each token of a row [T + 1] but the first, read from the row's start."""
    read = torch.from_numpy(row)[None].to(model.device)
    return model.score(read, len(row) - 1, PASS_TOKENS)[0].cpu().numpy()
