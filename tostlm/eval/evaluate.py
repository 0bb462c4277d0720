"""Measuring perplexity by context: several models on the same text, on one process or many, and going on with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

from tqdm import tqdm

from tostlm.data import TokenSet
from tostlm.errors import UserError
from tostlm.eval.finished import Finished
from tostlm.eval.inputs import EvalSettings, open_inputs
from tostlm.eval.models import ScoredModel, model_names
from tostlm.eval.perplexity import Score, Totals, gain, measure, spread
from tostlm.eval.protocols import PROTOCOLS, Passage, same_targets
from tostlm.eval.ranks import add_up, broadcast, join, together
from tostlm.eval.report import ModelScores, report_table, write_report
from tostlm.eval.text import HeldOutText, text_of
from tostlm.files import locked, require_writable
from tostlm.launch import RankInfo
from tostlm.plots import require_matplotlib

ALONE = RankInfo(0, 0, 1)
ENOUGH = 0.01  # standard error over windows, in nats a token, at which no more are needed
FEWEST_WINDOWS = 64
LOCK = ".perplexity.lock"


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
    with ExitStack() as locks:
        models, sets, out = together(ranks, lambda: _open(paths, data, settings, out, ranks, locks))
        return _evaluate(models, sets, settings, out, ranks)


def _evaluate(
    models: Sequence[ScoredModel], sets: Sequence[TokenSet], settings: EvalSettings, out: Path, ranks: RankInfo
) -> str:
    finished = Finished(None if ranks.rank else out, _command(models, sets, settings))
    names = model_names(models)
    by_set: list[list[ModelScores]] = []
    for tokens in sets:
        by_set.append([])
        texts = [text_of(tokens, model.tokenizer) for model in models]
        windows = together(ranks, partial(_windows, models[0], tokens, texts[0], settings))
        for name, model, text in zip(names, models, texts, strict=True):
            protocol = PROTOCOLS[settings.protocol](tokens, text, settings.contexts, windows, model.positions)
            passages = together(ranks, partial(_passages, protocol, name, text))
            totals = _totals(name, model, text, passages, settings, ranks, finished)
            by_set[-1].append(_scores(name, model, tokens, settings.protocol, totals))
    if ranks.rank:
        return ""
    write_report([scores for of_set in by_set for scores in of_set], settings.protocol, settings.dtype, out)
    finished.forget()
    tables = [report_table(scores, settings.contexts, settings.protocol) for scores in by_set]
    return "\n\n".join(tables) + f"\nwritten to {out}/perplexity.json, .csv and .png"


def _open(
    paths: Sequence[Path],
    data: Sequence[Path],
    settings: EvalSettings,
    out: Path | None,
    ranks: RankInfo,
    locks: ExitStack,
) -> tuple[list[ScoredModel], list[TokenSet], Path]:
    """Return the models, the sets and the folder of the report, which `locks` keeps from other evaluations."""
    require_matplotlib()
    models, sets = open_inputs(paths, data, settings)
    out = out or models[0].folder
    if not ranks.rank:
        require_writable(out)
        busy = f"another evaluation writes to {out}; wait for it, or name another folder with --out"
        locks.enter_context(locked(out / LOCK, busy))
    return models, sets, out


def _windows(model: ScoredModel, tokens: TokenSet, text: HeldOutText, settings: EvalSettings) -> int | None:
    """Return how many windows are scored: of the same targets, where none are asked for, enough for a small error."""
    if settings.windows is not None or settings.protocol != "same-targets":
        return settings.windows
    some = same_targets(tokens, text, settings.contexts, FEWEST_WINDOWS)
    shortest = [passage for passage in some if passage.contexts == (min(settings.contexts),)]
    needed = (spread(model, text, shortest, settings.pass_tokens) / ENOUGH) ** 2
    return max(FEWEST_WINDOWS, math.ceil(needed))


def _passages(protocol: Iterator[Passage], name: str, text: HeldOutText) -> list[Passage]:
    """Return what a protocol yields; raise UserError if that is nothing."""
    if passages := list(protocol):
        return passages
    raise UserError(f"no token of {text} can be scored by {name}; name data of longer documents with --data")


def _command(models: Sequence[ScoredModel], sets: Sequence[TokenSet], settings: EvalSettings) -> str:
    """Return all that determines what an evaluation measures."""
    contents = [model.content for model in models]
    texts = [tokens.manifest.content_sha256 for tokens in sets]
    settled = (settings.contexts, settings.protocol, settings.windows, str(settings.dtype), settings.clamp)
    return json.dumps([contents, texts, *settled])


def _totals(
    name: str,
    model: ScoredModel,
    text: HeldOutText,
    passages: Sequence[Passage],
    settings: EvalSettings,
    ranks: RankInfo,
    finished: Finished,
) -> dict[int, Totals]:
    """Return the sums at each context that the model can read and some token is scored at."""
    totals: dict[int, Totals] = {}
    read = sum(passage.end - passage.start - 1 for passage in passages)
    # `disable=None` shows the bar on a terminal only.
    with tqdm(total=read, desc=name, unit=" tokens", disable=True if ranks.rank else None) as bar:

        def progress(own: int) -> None:
            bar.update(own * ranks.world_size)

        for contexts, group in groupby(passages, key=lambda passage: passage.contexts):
            key = f"{model.path} {text.folder} {contexts}"
            sums = broadcast(ranks, finished.get(key, len(text.document_bounds)))
            if sums is None:
                own = partial(measure, model, text, contexts, pass_tokens=settings.pass_tokens, on_progress=progress)
                sums = add_up(ranks, list(group), own)
                finished.put(key, sums)
            totals |= {context: found for context, found in zip(contexts, sums, strict=True) if found.tokens.any()}
    return totals


def _scores(
    name: str, model: ScoredModel, tokens: TokenSet, protocol: str, totals: Mapping[int, Totals]
) -> ModelScores:
    scores = [Score.of(context, sums) for context, sums in totals.items()]
    pairs = pairwise(totals.items()) if protocol == "same-targets" else ()
    gains = [(context, gain(before, after)) for (_, before), (context, after) in pairs]
    of = (name, str(model.path), model.step, model.positions)
    return ModelScores(*of, str(tokens.folder), scores, gains, model.clamped)
