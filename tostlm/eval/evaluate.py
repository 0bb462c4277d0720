"""Measuring perplexity by context: several models on the same text, on one process or many, and going on with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from tostlm.checkpoint import COMPLETE, Checkpoint, load_checkpoint, run_folder
from tostlm.data import VALIDATION, TokenSet
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.eval.finished import Finished
from tostlm.eval.losses import PASS_TOKENS
from tostlm.eval.perplexity import Score, Totals, gain, measure, require_same_tokenizer, spread
from tostlm.eval.protocols import PROTOCOLS, same_targets
from tostlm.eval.ranks import add_up, broadcast, join, together
from tostlm.eval.report import ModelScores, report_table, write_report
from tostlm.files import distinct_names, require_writable, sha256_of
from tostlm.launch import RankInfo
from tostlm.plots import require_matplotlib

ALONE = RankInfo(0, 0, 1)
ENOUGH = 0.01  # standard error over windows, in nats a token, at which no more are needed
FEWEST_WINDOWS = 64


class EvalSettings(NamedTuple):
    """How models are scored."""

    contexts: Sequence[int]  # in tokens
    protocol: str = "same-targets"  # one of PROTOCOLS
    windows: int | None = None  # scored at each context, or documents of a stream; None for enough, or for all
    device: torch.device | None = None  # None is `best_device`
    dtype: torch.dtype | None = None  # of the weights; None is the checkpoint's
    pass_tokens: int = PASS_TOKENS  # that one forward pass reads


def evaluate_perplexity(
    paths: Sequence[Path],
    data: Sequence[Path],
    settings: EvalSettings,
    out: Path | None,
    ranks: RankInfo = ALONE,
) -> str:
    """Score checkpoints on held-out text at growing contexts, write the report and return its table.

    What an interrupted evaluation has finished is not measured again.

    Args:
        paths: checkpoints, or folders of runs for their newest ones.
        data: prepared folders; () is that of the first checkpoint's run, of a blend the first one.
        out: folder of the report; None: the first run's folder.
        ranks: which share the text; every one of them calls this, rank 0 writes.

    Raises:
        UserError: a checkpoint, the data and the contexts do not fit each other, or matplotlib is missing.
    """
    join(ranks)
    checkpoints, sets, out = together(ranks, lambda: _open(paths, data, settings, out, ranks))
    finished = Finished(None if ranks.rank else out, _command(checkpoints, sets, settings))
    names = distinct_names([run_folder(checkpoint.path) for checkpoint in checkpoints])
    found = []
    for tokens in sets:
        windows = together(ranks, partial(_windows, checkpoints[0], tokens, settings))
        for name, checkpoint in zip(names, checkpoints, strict=True):
            totals = _totals(name, checkpoint, tokens, settings._replace(windows=windows), ranks, finished)
            found.append(_scores(name, checkpoint, tokens, settings.protocol, totals))
    if ranks.rank:
        return ""
    write_report(found, settings.protocol, settings.dtype, out)
    finished.forget()
    by_set = [[model for model in found if model.data == str(tokens.folder)] for tokens in sets]
    tables = [report_table(models, settings.contexts, settings.protocol) for models in by_set]
    return "\n\n".join(tables) + f"\nwritten to {out}/perplexity.json, .csv and .png"


def _open(
    paths: Sequence[Path], data: Sequence[Path], settings: EvalSettings, out: Path | None, ranks: RankInfo
) -> tuple[list[Checkpoint], list[TokenSet], Path]:
    """Return the checkpoints, the sets and the folder of the report, which all fit each other."""
    require_matplotlib()
    device, shortest = settings.device or best_device(ranks.local_rank), min(settings.contexts)
    checkpoints = [load_checkpoint(path, device) for path in paths]
    sets = [TokenSet(f, VALIDATION) for f in data or [checkpoints[0].config.data.sets[0][0]]]
    for checkpoint in checkpoints:
        positions = checkpoint.config.model.positions
        if positions is not None and positions < shortest:
            least = f"the shortest of --contexts, {shortest}"
            raise UserError(f"{checkpoint.path} has {positions} positions, fewer than {least}")
        for tokens in sets:
            require_same_tokenizer(checkpoint, tokens)
        if settings.dtype is not None:
            checkpoint.lm.to(settings.dtype)
    out = out or run_folder(checkpoints[0].path)
    if not ranks.rank:
        require_writable(out)
    return checkpoints, sets, out


def _windows(checkpoint: Checkpoint, tokens: TokenSet, settings: EvalSettings) -> int | None:
    """Return how many windows are scored: of the same targets, where none are asked for, enough for a small error."""
    if settings.windows is not None or settings.protocol != "same-targets":
        return settings.windows
    some = same_targets(tokens, settings.contexts, FEWEST_WINDOWS)
    shortest = [passage for passage in some if passage.contexts == (min(settings.contexts),)]
    needed = (spread(checkpoint, tokens, shortest, settings.pass_tokens) / ENOUGH) ** 2
    return max(FEWEST_WINDOWS, math.ceil(needed))


def _command(checkpoints: Sequence[Checkpoint], sets: Sequence[TokenSet], settings: EvalSettings) -> str:
    """Return all that determines what an evaluation measures."""
    contents = [sha256_of(checkpoint.path / COMPLETE) for checkpoint in checkpoints]
    texts = [tokens.manifest.content_sha256 for tokens in sets]
    return json.dumps([contents, texts, settings.contexts, settings.protocol, settings.windows, str(settings.dtype)])


def _totals(
    name: str, checkpoint: Checkpoint, tokens: TokenSet, settings: EvalSettings, ranks: RankInfo, finished: Finished
) -> dict[int, Totals]:
    """Return the sums at each context that the model can read and some token is scored at."""
    positions = checkpoint.config.model.positions
    passages = list(PROTOCOLS[settings.protocol](tokens, settings.contexts, settings.windows, positions))
    totals: dict[int, Totals] = {}
    read = sum(passage.end - passage.start - 1 for passage in passages)
    # `disable=None` shows the bar on a terminal only.
    with tqdm(total=read, desc=name, unit=" tokens", disable=True if ranks.rank else None) as bar:

        def progress(own: int) -> None:
            bar.update(own * ranks.world_size)

        for contexts, group in groupby(passages, key=lambda passage: passage.contexts):
            key = f"{checkpoint.path} {tokens.folder} {contexts}"
            sums = broadcast(ranks, finished.get(key, len(tokens.document_bounds)))
            if sums is None:
                own = partial(
                    measure, checkpoint, tokens, contexts, pass_tokens=settings.pass_tokens, on_progress=progress
                )
                sums = add_up(ranks, list(group), own)
                finished.put(key, sums)
            totals |= {context: found for context, found in zip(contexts, sums, strict=True) if found.tokens.any()}
    return totals


def _scores(
    name: str, checkpoint: Checkpoint, tokens: TokenSet, protocol: str, totals: Mapping[int, Totals]
) -> ModelScores:
    scores = [Score.of(context, sums) for context, sums in totals.items()]
    pairs = pairwise(totals.items()) if protocol == "same-targets" else ()
    gains = [(context, gain(before, after)) for (_, before), (context, after) in pairs]
    step, positions = checkpoint.train_state.step, checkpoint.config.model.positions
    return ModelScores(name, str(checkpoint.path), step, positions, str(tokens.folder), scores, gains)
