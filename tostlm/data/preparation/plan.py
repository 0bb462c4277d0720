"""What a preparation will do, decided once and written down before any work.

A folder in the making holds

    plan.json           the settings and the parts
    tokenizer file
    parts/00012/        the shards of a finished part, and part.json; it appears whole or not at all

Whoever works on it, on however many machines, reads the plan there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pydantic

from tostlm.data.preparation.selection import Selection, Selector
from tostlm.data.preparation.sources import PART_BYTES, WorkUnit, parts_of
from tostlm.data.shards import MANIFEST, Shard, dtype_for, read_manifest
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError, error_summary
from tostlm.files import require_writable, write_atomically

PLAN = "plan.json"
PARTS = "parts"
PART = "part.json"


class PreparationSettings(pydantic.BaseModel):
    """Everything that decides what the shards hold, but for the tokenizer."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...]
    selection: Selection = Selection()
    heldout_fraction: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.01
    shard_tokens: Annotated[int, pydantic.Field(ge=1)] = 100_000_000
    part_bytes: Annotated[int, pydantic.Field(ge=1)] = PART_BYTES
    allow_lossy: bool = False  # take a tokenizer that changes text
    dedup: bool = False  # keep the first of documents with the same text
    dedup_against: tuple[Path, ...] = ()  # prepared folders whose documents are left out


class PreparationPlan(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    command: str
    settings: PreparationSettings
    tokenizer_sha256: str
    parts: tuple[WorkUnit, ...]


class FinishedPart(pydantic.BaseModel):
    """What part.json says."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    tokenizer_sha256: str
    dropped: dict[str, int]
    examples: tuple[tuple[str, str, str], ...]  # reason, place, detail of the first ones dropped
    shards: dict[str, tuple[Shard, ...]]  # by split


def part_folder(out: Path, index: int) -> Path:
    return out / PARTS / f"{index:05d}"


def make_plan(settings: PreparationSettings, tokenizer: Tokenizer, out: Path, command: str) -> PreparationPlan:
    """The plan in `out`, made now unless one is there; `out` is made too.

    Raises:
        UserError: `out` is prepared already, holds something else, or was begun with other settings; a setting or the
            tokenizer cannot be used.
    """
    if (out / MANIFEST).exists():
        raise UserError(f"{out} is prepared already; remove it to prepare it again, or choose another --out")
    dtype_for(tokenizer.vocab_size)
    if (loss := tokenizer.find_lossy_text()) and not settings.allow_lossy:
        raise UserError(f"the tokenizer loses text: {loss}; use a lossless one, or accept that with --allow-lossy")
    Selector(settings.selection)
    for folder in settings.dedup_against:
        read_manifest(folder)
    if not (out / PLAN).exists():
        if out.exists() and (not out.is_dir() or any(_is_strange(path, tokenizer) for path in out.iterdir())):
            raise UserError(f"{out} exists and is no prepared data; choose an --out that does not exist")
        parts = tuple(parts_of(settings.sources, settings.part_bytes))
        plan = PreparationPlan(command=command, settings=settings, tokenizer_sha256=tokenizer.sha256, parts=parts)
        require_writable(out)
        _publish(out / PLAN, plan.model_dump_json(indent=1).encode())
    plan = read_plan(out)
    _require_same(plan, settings, tokenizer, out)
    if not (out / tokenizer.file_name).exists():
        _publish(out / tokenizer.file_name, tokenizer.content)
    if plan.settings != settings:  # in how errors count
        plan = plan.model_copy(update={"settings": settings})
        write_atomically(out / PLAN, plan.model_dump_json(indent=1))
    return plan


def _is_strange(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether no preparation that was begun, perhaps a moment ago by another task, has put this here."""
    return path.name[0] != "." and path.name not in (PLAN, PARTS, tokenizer.file_name)


def _publish(path: Path, content: bytes) -> None:
    """Write a file whole, unless another process was first."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    os.close(descriptor)
    mine = Path(name)
    try:
        write_atomically(mine, content)
        os.link(mine, path)
    except FileExistsError:
        pass
    finally:
        mine.unlink(missing_ok=True)


def _require_same(plan: PreparationPlan, settings: PreparationSettings, tokenizer: Tokenizer, out: Path) -> None:
    if plan.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{out} was begun with another tokenizer; go on with its own, or choose another --out")
    begun, asked = _flat(plan.settings), _flat(settings)
    for key, value in begun.items():
        if value != asked[key]:
            raise UserError(
                f"{out} was begun with {key}={value}, not {asked[key]}; go on with the same, or choose another --out"
            )


def _flat(settings: PreparationSettings) -> dict[str, object]:
    """Settings that a preparation must be finished with; a part that has ended met no error, however they count."""
    content = json.loads(settings.model_dump_json(exclude={"selection": {"on_error"}}))
    return {**content.pop("selection"), **content}


def read_plan(out: Path) -> PreparationPlan:
    """
    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return PreparationPlan.model_validate_json((out / PLAN).read_bytes())
    except OSError:
        raise UserError(f"{out} holds no preparation that was begun; start one with `tostlm prepare`") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{out / PLAN} is damaged ({error_summary(error)}); remove {out} and prepare again") from None


def unfinished(out: Path, plan: PreparationPlan) -> list[int]:
    """The parts that are still to be done."""
    return [index for index in range(len(plan.parts)) if not (part_folder(out, index) / PART).is_file()]


def finished_parts(out: Path, plan: PreparationPlan) -> Sequence[FinishedPart]:
    """What every part holds, in order.

    Raises:
        UserError: one is not finished, damaged, or was made with another tokenizer than the plan's.
    """
    missing = unfinished(out, plan)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(plan.parts)} parts of {out} are not finished, the first is {missing[0]}; "
            "run `tostlm prepare` again for them, then --merge"
        )
    found = []
    for index in range(len(plan.parts)):
        path = part_folder(out, index) / PART
        try:
            part = FinishedPart.model_validate_json(path.read_bytes())
        except pydantic.ValidationError as error:
            raise UserError(f"{path} is damaged ({error_summary(error)}); remove {path.parent} and run again") from None
        if part.tokenizer_sha256 != plan.tokenizer_sha256:
            raise UserError(
                f"part {index} of {out} was made with another tokenizer (sha256 {part.tokenizer_sha256[:12]}) than "
                f"the plan's ({plan.tokenizer_sha256[:12]}); remove {path.parent} and run again"
            )
        found.append(part)
    return found
