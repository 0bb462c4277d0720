"""Descriptions for people: the checkpoints of a run, what one of them holds, and what tells two apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tostlm.checkpoint.folders import DAMAGED, LATEST, PARTIAL
from tostlm.checkpoint.integrity import COMPLETE, CONFIG
from tostlm.checkpoint.layout import (
    STEP,
    Checkpoint,
    TrainState,
    load_checkpoint,
    read_train_state,
    step_folders,
    step_of,
)
from tostlm.checkpoint.rollback import PASSED_OVER
from tostlm.config import RunConfig, load_config
from tostlm.errors import UserError
from tostlm.files import aligned, format_bytes
from tostlm.model import count_body_parameters, count_parameters, state_bytes

# What the names of folders that no run resumes from begin or end with.
OTHERS = {PARTIAL: "unfinished", DAMAGED: "quarantined", PASSED_OVER: "passed over in a rollback"}


class ListedCheckpoint(NamedTuple):
    """A folder among a run's checkpoints."""

    name: str
    step: int
    tokens: int | None  # that the run had read; None where its files do not say
    validation_loss: float | None
    bytes: int
    saved: str  # when, in local time
    notes: tuple[str, ...]  # "latest", "best", or why no run resumes from it


def list_checkpoints(run_dir: Path) -> list[ListedCheckpoint]:
    """Return what lies among a run's checkpoints, by step: what is damaged, passed over or unfinished too.

    Raises:
        UserError: there is nothing.
    """
    folder = run_dir / "checkpoints"
    named = {path: "" if (path / COMPLETE).is_file() else "unfinished" for path in step_folders(run_dir)}
    for affix, note in OTHERS.items():
        others = folder.glob(f"{affix}*" if affix == PARTIAL else f"*{affix}")
        named |= {path: note for path in others if STEP.match(_own_name(path))}
    if not named:
        raise UserError(f"{run_dir} is not the folder of a run that saved a checkpoint")
    config = None
    with suppress(UserError):
        config = load_config(run_dir / CONFIG)
    latest = (folder / LATEST).read_text(errors="replace").strip() if (folder / LATEST).is_file() else ""
    rows = [_listed(path, note, config, latest) for path, note in named.items()]
    losses = [row.validation_loss for row in rows if row.validation_loss is not None and not set(row.notes) - {LATEST}]
    if losses:
        rows = [
            row._replace(notes=(*row.notes, "best"))
            if row.validation_loss == min(losses) and not set(row.notes) - {LATEST}
            else row
            for row in rows
        ]
    return sorted(rows, key=lambda row: (row.step, row.name))


def _own_name(path: Path) -> str:
    name = path.name
    for affix in OTHERS:
        name = name.removeprefix(affix).removesuffix(affix)
    return name


def _listed(path: Path, note: str, config: RunConfig | None, latest: str) -> ListedCheckpoint:
    state: TrainState | None = None
    with suppress(UserError):
        state = read_train_state(path)
    step = step_of(path.with_name(_own_name(path)))
    return ListedCheckpoint(
        path.name,
        step,
        config.tokens_after(step) if config is not None else None,
        state.validation_loss if state and math.isfinite(state.validation_loss or 0.0) else None,
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S"),
        tuple(filter(None, (note, LATEST if path.name == latest else ""))),
    )


def table(rows: list[ListedCheckpoint]) -> str:
    """Return a table of listed checkpoints."""
    head = ("checkpoint", "tokens", "validation loss", "size", "saved", "")
    cells = [
        (
            row.name,
            "" if row.tokens is None else f"{row.tokens:,}",
            "" if row.validation_loss is None else f"{row.validation_loss:.4f}",
            format_bytes(row.bytes),
            row.saved,
            ", ".join(row.notes),
        )
        for row in rows
    ]
    return aligned([head, *cells], left=(0, 4, 5))


def describe(path: Path, tokenizer: Path | None = None) -> str:
    """Return what a checkpoint, or a model of another format, holds. Its weights are compared with their checksums.

    Raises:
        UserError: it is damaged, or there is none.
    """
    checkpoint = load_checkpoint(path, tokenizer=tokenizer)
    config, state, lm = checkpoint.config, checkpoint.train_state, checkpoint.lm
    model, own = lm.config, checkpoint.tokenizer
    context = config.data.context_tokens
    mixers = ", ".join(dict.fromkeys(options.mixer for options in model.layer_plan))
    dtype = str(lm.embed.weight.dtype).removeprefix("torch.")
    facts = {
        "path": str(checkpoint.path),
        "model": f"{model.depth} blocks of {model.width} channels and {model.heads} heads: {mixers}",
        "parameters": f"{count_parameters(model):,}, of which {count_body_parameters(model):,} beside the embeddings; "
        f"{dtype}",
        "positions": "unbounded" if model.positions is None else f"{model.positions:,}",
        "state": f"{state_bytes(model, context):,} bytes after {context:,} tokens",
        "tokenizer": f"{own.file_name}, {own.vocab_size:,} tokens, sha256 {own.sha256[:16]}",
    }
    if not state.imported_from or state.step:
        loss = "" if state.validation_loss is None else f", validation loss {state.validation_loss:.4f}"
        facts["training"] = (
            f"step {state.step:,} of {config.train.steps:,}, {config.tokens_after(state.step):,} tokens{loss}; "
            f"{config.optimizer.name} at {config.optimizer.lr:g}, precision {config.precision}"
        )
        facts["data"] = ", ".join(map(str, config.data.folders))
    for name, origin in (("branched from", state.branched_from), ("imported from", state.imported_from)):
        if origin:
            facts[name] = origin
    if checkpoint.path.is_dir():
        files = sorted(file for file in checkpoint.path.rglob("*") if file.is_file())
        facts["files"] = "\n".join(
            f"{format_bytes(f.stat().st_size):>10}  {f.relative_to(checkpoint.path)}" for f in files
        )
    return "\n".join(f"{name:<14}{value.replace(chr(10), chr(10) + ' ' * 14)}" for name, value in facts.items())


def differences(first: Path, second: Path) -> list[str]:
    """Return what tells two checkpoints, or models of other formats, apart, a line each; [] if nothing does.

    Raises:
        UserError: one is damaged, or there is none.
    """
    a, b = load_checkpoint(first), load_checkpoint(second)
    lines = list(_unlike("config", a.config.model_dump(mode="json"), b.config.model_dump(mode="json")))
    lines += _unlike("progress", a.train_state._asdict(), b.train_state._asdict())
    if a.tokenizer.sha256 != b.tokenizer.sha256:
        lines.append(f"tokenizer: {a.tokenizer.sha256[:16]} and {b.tokenizer.sha256[:16]}")
    return lines + _unlike_weights(a, b)


def _unlike(kind: str, a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys of nested mappings whose values differ."""
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key, "unset"), b.get(key, "unset")
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _unlike(kind, one, other, f"{prefix}{key}.")
        elif json.dumps(one) != json.dumps(other):
            yield f"{kind}: {prefix}{key} is {json.dumps(one):.60} and {json.dumps(other):.60}"


@torch.no_grad()
def _unlike_weights(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Return how far two models' parameters are apart, the farthest first."""
    ours, theirs = dict(a.lm.named_parameters()), dict(b.lm.named_parameters())
    apart: list[tuple[float, str]] = []
    lines = []
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            shapes = (str(tuple(own[name].shape)) if name in own else "none" for own in (ours, theirs))
            lines.append(f"weights: {name} is {' and '.join(shapes)}")
        elif not torch.equal(ours[name], theirs[name]):
            one, other = ours[name].double(), theirs[name].double()
            change = float((one - other).norm() / one.norm().clamp_min(1e-30))
            apart.append((change if math.isfinite(change) else math.inf, name))
    apart.sort(key=lambda entry: (-entry[0], entry[1]))
    return lines + [
        f"weights: {name} differs by {change:.1e} of its norm"
        if math.isfinite(change)
        else f"weights: {name} is not finite"
        for change, name in apart
    ]
