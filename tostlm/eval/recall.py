"""Measuring what trained models bring back from their context, by its length and by how much is to be kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import torch
from torch import Tensor
from tqdm import tqdm

from tostlm.errors import UserError
from tostlm.eval.bootstrap import ratio_interval
from tostlm.eval.inputs import EvalSettings, open_inputs
from tostlm.eval.models import ScoredModel, model_names
from tostlm.eval.probes import NEEDLE, PROBES, Material, Probe, recall
from tostlm.eval.report import clamping, wrong_file
from tostlm.eval.text import HeldOutText, text_of
from tostlm.eval.token_scores import nats_and_hits
from tostlm.files import read_json_object, require_writable, write_atomically

FILE = "recall.json"
SHORTEST = 4 * NEEDLE + 1  # tokens of a sequence
FIRST_POSITIONS = 16  # that a chain's divergence is averaged over first; each next group is as long as all before


class Answers(NamedTuple):
    """How well a model answers a probe of some length."""

    task: str
    load: int | None  # pairs that are to be kept; None where the length alone says how much
    tokens: int
    accuracy: float  # share of what is asked for which no other token is more probable
    low: float | None  # the bounds of its confidence interval of 95% over sequences
    high: float | None
    nats: float  # mean loss of what is asked
    first_nats: float | None  # mean loss where it stands for the first time, without having been read
    chance: float  # accuracy of a guess among all tokens
    answers: int
    best_nats: float  # the lowest possible mean loss
    divergence: list[tuple[int, float]] | None  # of a chain: up to which position, mean KL(best || model) in nats


class ProbedModel(NamedTuple):
    """What was found of a model; `positions` is the longest context it can read, None without a limit."""

    name: str
    checkpoint: str
    step: int | None
    positions: int | None
    results: list[Answers]
    clamped: int | None = None  # learned positions, beyond which it used the last one; None where it did not


PROBED_MODELS = pydantic.TypeAdapter(list[ProbedModel])


def measure_recall(
    paths: Sequence[Path],
    data: Sequence[Path],
    settings: EvalSettings,
    pairs: Sequence[int],
    sequences: int,
    seed: int,
    out: Path | None,
) -> str:
    """Probe models at each context and load, write recall.json and return its table.

    Args:
        paths: checkpoints, folders of runs for their newest ones, or Hugging Face folders.
        data: a prepared folder whose held-out text stands between; () is that of the first checkpoint's run.
        pairs: loads of recall; each needs four tokens a pair.
        sequences: read at each length and load.
        out: folder of the report; None: the first run's folder.

    Raises:
        UserError: models, data, contexts and loads do not fit each other.
    """
    _require_lengths(settings.contexts, pairs)
    models, (held_out, *_) = open_inputs(paths, data, settings)
    out = out or models[0].folder
    require_writable(out)
    found = []
    for name, model in zip(model_names(models), models, strict=True):
        text = text_of(held_out, model.tokenizer)
        if len(text) < max(settings.contexts):
            raise UserError(f"{text} has {len(text):,} tokens, fewer than a context of {max(settings.contexts):,}")
        asked = [(task, load, T) for T in settings.contexts for task, load in _tasks(T, pairs)]
        readable = [case for case in asked if model.positions is None or case[2] <= model.positions]
        bar = tqdm(readable, desc=name, unit=" probes", disable=None)  # on a terminal only
        results = [answer(model, text, *case, sequences, seed, settings.pass_tokens) for case in bar]
        found.append(ProbedModel(name, str(model.path), model.step, model.positions, results, model.clamped))
    models_json = [{**model._asdict(), "results": [r._asdict() for r in model.results]} for model in found]
    content = {"seed": seed, "sequences": sequences, "data": str(held_out.folder), "models": models_json}
    write_atomically(out / FILE, json.dumps(content, indent=2) + "\n")
    return "\n\n".join(recall_table(model, settings.contexts) for model in found) + f"\nwritten to {out / FILE}"


def read_recall(path: Path) -> list[ProbedModel]:
    """Return what recall.json has of models.

    Raises:
        UserError: the file is damaged, or another one.
    """
    try:
        return PROBED_MODELS.validate_python((read_json_object(path.read_bytes()) or {})["models"])
    except (KeyError, pydantic.ValidationError) as error:
        raise wrong_file(path, "tostlm eval recall", error) from None


def _require_lengths(contexts: Sequence[int], pairs: Sequence[int]) -> None:
    if min(contexts) < SHORTEST:
        raise UserError(f"--contexts {min(contexts)} is too short for a probe; use {SHORTEST} tokens or more")
    if 4 * min(pairs) > max(contexts):
        raise UserError(f"--pairs {min(pairs)} takes {4 * min(pairs)} tokens, more than the longest of --contexts")


def _tasks(T: int, pairs: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    """Yield the probes that have room in T tokens, and their loads."""
    yield from (("recall", load) for load in pairs if 4 * load <= T)
    yield from ((task, None) for task in PROBES)


def answer(
    model: ScoredModel,
    text: HeldOutText,
    task: str,
    load: int | None,
    tokens: int,
    sequences: int,
    seed: int,
    pass_tokens: int,
) -> Answers:
    """Return how well a model answers a probe of `tokens` T on some sequences.

    Raises:
        UserError: a load is more than there are tokens, or a loss is not finite.
    """
    material = Material(model.tokenizer, text, seed)
    if load is not None and load > material.symbols:
        raise UserError(f"--pairs {load} are more keys than {model.path} has tokens, {material.symbols}")
    probe = recall(material, sequences, tokens, load) if load else PROBES[task](material, sequences, tokens)
    scores = _read(model, probe, pass_tokens)
    if not torch.isfinite(scores).all():
        raise UserError(f"{model.path}: a loss of {task} at {tokens} tokens is not finite; the model has diverged")
    nats, hits = scores[..., 0], scores[..., 1]  # [B, T]
    asked = probe.asked.double()
    return Answers(
        task,
        load,
        tokens,
        *ratio_interval((hits * asked).sum(1).numpy(), asked.sum(1).numpy()),
        nats=float(nats[probe.asked].mean()),
        first_nats=None if probe.stated is None else float(nats[probe.stated].mean()),
        chance=1 / material.symbols,
        answers=int(asked.sum()),
        **_beside_best(probe, scores[..., 2:]),
    )


def _read(model: ScoredModel, probe: Probe, pass_tokens: int) -> Tensor:
    """Return of every token read its loss, whether it was the most probable, and the log-probabilities of the states.

    [B, T, 2 + S], float64.
    """
    symbols = None if probe.symbols is None else probe.symbols.to(model.device)
    nats_and_hit = nats_and_hits(model.tokenizer.vocab_size)

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        found = nats_and_hit(logits, targets)
        return found if symbols is None else torch.cat([found, logits.log_softmax(-1)[:, symbols]], -1)

    T = probe.rows.shape[1] - 1
    batches = probe.rows.split(max(1, pass_tokens // T))
    return torch.cat([model.score(rows.to(model.device), T, pass_tokens, score).double().cpu() for rows in batches])


def _beside_best(probe: Probe, log_probabilities: Tensor) -> dict[str, Any]:
    """Return the lowest possible loss of what is asked, and the divergence from the best prediction by position."""
    if probe.best is None or probe.symbols is None:
        return {"best_nats": 0.0, "divergence": None}
    came = probe.rows[:, 1:, None] == probe.symbols  # [B, T, S]
    divergence = (probe.best * (probe.best.log() - log_probabilities)).sum(-1)  # [B, T]
    T = divergence.shape[1]
    bounds = [1, *(FIRST_POSITIONS << n for n in range(T.bit_length()) if FIRST_POSITIONS << n < T), T]
    means = [(end, float(divergence[:, start:end].mean())) for start, end in pairwise(bounds)]
    return {"best_nats": float(-probe.best[came].view_as(divergence)[probe.asked].log().mean()), "divergence": means}


def recall_table(model: ProbedModel, contexts: Sequence[int]) -> str:
    """Return what a model answers rightly by probe and context, and the loss of what is asked beside its first."""
    cases = list(dict.fromkeys((found.task, found.load) for found in model.results))
    found = {(result.task, result.load, result.tokens): result for result in model.results}
    lines = [f"{model.name}: answers that are right, their loss in nats (and at first sight)"]
    lines += [f"{'context':>14}" + "".join(f"{context:>24,}" for context in contexts)]
    for task, load in cases:
        cells = [_cell(found.get((task, load, context))) for context in contexts]
        lines.append(f"{task if load is None else f'{task} {load}':>14}" + "".join(f"{cell:>24}" for cell in cells))
    if model.positions is not None and model.positions < max(contexts):
        lines.append(f"{model.name} has {model.positions} positions and reads no further")
    if model.clamped is not None:
        lines.append(clamping(model.name, model.clamped))
    chains = [result for result in model.results if result.divergence]
    for result in chains[-1:]:
        groups = ", ".join(f"{end:,}: {nats:.3f}" for end, nats in result.divergence or ())
        lines.append(f"chain of {result.tokens:,} tokens, nats from the best prediction up to token {groups}")
    return "\n".join(lines)


def _cell(found: Answers | None) -> str:
    if found is None:
        return "-"
    beside = f" ({found.first_nats:.2f})" if found.first_nats is not None else f" (best {found.best_nats:.2f})"
    return f"{found.accuracy:.1%} {found.nats:.2f}{beside}"
