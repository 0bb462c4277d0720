"""The plan of a preparation: which work units there are and with which settings each is tokenized.

An unfinished folder holds

    plan.json           the settings and the work units
    tokenizer file
    units/00012/        the shards of a finished work unit, and result.json; the folder appears whole or not at all

Every process that takes part, on any machine, reads the plan there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import pydantic

from tostlm.data.preparation.selection import Selection, Selector
from tostlm.data.preparation.sources import UNIT_BYTES, FileState, WorkUnit, list_work_units
from tostlm.data.shards import MANIFEST, FrozenModel, Shard, dtype_for, read_manifest
from tostlm.data.tokenizers import Tokenizer
from tostlm.errors import UserError
from tostlm.files import require_writable, write_atomically

PLAN = "plan.json"
UNITS = "units"
RESULT = "result.json"
MAY_CHANGE = {"on_error", "max_window_bytes"}  # settings on which a finished unit that met no error does not depend


class PreparationSettings(Selection):
    """Everything that decides what the shards hold, except the tokenizer."""

    sources: tuple[str, ...]
    heldout_fraction: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.01
    shard_tokens: Annotated[int, pydantic.Field(ge=1)] = 100_000_000
    unit_bytes: Annotated[int, pydantic.Field(ge=1)] = UNIT_BYTES
    allow_lossy: bool = False  # accept a tokenizer that changes text
    dedup: bool = False  # keep the first of documents with the same text
    dedup_against: tuple[Path, ...] = ()  # prepared folders whose documents are left out


class PreparationPlan(FrozenModel):
    """The content of plan.json."""

    command: str
    settings: PreparationSettings
    tokenizer_sha256: str
    units: tuple[WorkUnit, ...]


class UnitResult(FrozenModel):
    """The content of a finished work unit's result.json."""

    tokenizer_sha256: str
    files: dict[str, FileState]  # of the source, by path
    dropped: dict[str, int]
    examples: list[dict[str, str]]  # reason, document and detail of the first documents dropped
    shards: dict[str, tuple[Shard, ...]]  # by split


def unit_folder(out: Path, index: int) -> Path:
    return out / UNITS / f"{index:05d}"


def make_plan(settings: PreparationSettings, tokenizer: Tokenizer, out: Path, command: str) -> PreparationPlan:
    """Return the plan in `out`; make the folder and the plan if there is none.

    Raises:
        UserError: `out` is prepared already, holds something else, or was started with other settings; a setting or
            the tokenizer cannot be used.
    """
    if (out / MANIFEST).exists():
        raise UserError(f"{out} is prepared already; remove it to prepare it again, or choose another --out")
    dtype_for(tokenizer.vocab_size)
    if (loss := tokenizer.find_lossy_text()) and not settings.allow_lossy:
        raise UserError(f"the tokenizer loses text: {loss}; use a lossless one, or accept that with --allow-lossy")
    Selector(settings)
    for folder in settings.dedup_against:
        read_manifest(folder)
    continues = (out / PLAN).exists()
    if not continues:
        # Another task may have started in this folder a moment ago.
        own = (PLAN, UNITS, tokenizer.file_name)
        if out.exists() and not (out.is_dir() and all(p.name in own or p.name[0] == "." for p in out.iterdir())):
            raise UserError(f"{out} exists and is no prepared data; choose an --out that does not exist")
        units = tuple(list_work_units(settings.sources, settings.unit_bytes))
        plan = PreparationPlan(command=command, settings=settings, tokenizer_sha256=tokenizer.sha256, units=units)
        require_writable(out)
        write_atomically(out / PLAN, plan.model_dump_json(indent=1), overwrite=False)
    plan = read_plan(out)
    _require_same(plan, settings, tokenizer, out)
    if continues:
        _require_same_files(plan, out)
    write_atomically(out / tokenizer.file_name, tokenizer.content, overwrite=False)
    if plan.settings != settings:  # in `MAY_CHANGE`
        plan = plan.model_copy(update={"settings": settings})
        write_atomically(out / PLAN, plan.model_dump_json(indent=1))
    return plan


def _require_same(plan: PreparationPlan, settings: PreparationSettings, tokenizer: Tokenizer, out: Path) -> None:
    if plan.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{out} was started with another tokenizer; continue with its own, or choose another --out")
    started, requested = (chosen.model_dump(mode="json", exclude=MAY_CHANGE) for chosen in (plan.settings, settings))
    for key, value in started.items():
        if value != requested[key]:
            raise UserError(
                f"{out} was started with {key}={value}, not {requested[key]}; use the same, or choose another --out"
            )


def _require_same_files(plan: PreparationPlan, out: Path) -> None:
    """Check that the sources have the files of the plan, and that those of finished work units have not changed.

    A file that no finished unit has read may be corrected, unless the plan divides it by its bytes.
    """
    advice = f"put it back, or remove {out} and prepare again"
    planned, found = (
        {file: unit for unit in units for file in unit.files}
        for units in (plan.units, list_work_units(plan.settings.sources, plan.settings.unit_bytes))
    )
    for file in sorted(planned.keys() ^ found.keys()):
        what = "is gone or empty" if file in planned else "is new"
        raise UserError(f"{file} {what} since the preparation in {out} began; {advice}")
    for file, unit in planned.items():
        if unit.byte_range is not None and unit.byte_range[1] != Path(file).stat().st_size:
            raise UserError(
                f"{file} has not {unit.byte_range[1]} bytes as when the preparation in {out} began; {advice}"
            )
    state_of = cache(FileState.of)  # a file may be in many units
    for index in set(range(len(plan.units))) - set(unfinished(out, plan)):
        for file, state in read_result(out, index).files.items():
            if not state.is_same(state_of(file)):
                raise UserError(f"{file} changed since work unit {index} of {out} read it; {advice}")


def read_plan(out: Path) -> PreparationPlan:
    """Return the plan in a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (out / PLAN).is_file():
        raise UserError(f"{out} holds no unfinished preparation; start one with `tostlm prepare`")
    return PreparationPlan.read(out / PLAN, f"remove {out} and prepare again")


def unfinished(out: Path, plan: PreparationPlan) -> list[int]:
    """Return the indices of the work units that are not finished."""
    return [index for index in range(len(plan.units)) if not (unit_folder(out, index) / RESULT).is_file()]


def read_results(out: Path, plan: PreparationPlan) -> list[UnitResult]:
    """Return the results of all work units, in order.

    Raises:
        UserError: one is not finished, damaged, or was made with another tokenizer than the plan's.
    """
    if missing := unfinished(out, plan):
        raise UserError(
            f"{len(missing)} of {len(plan.units)} work units of {out} are not finished, the first is {missing[0]}; "
            "run `tostlm prepare` again for them, then --merge"
        )
    results = []
    for index in range(len(plan.units)):
        result = read_result(out, index)
        if result.tokenizer_sha256 != plan.tokenizer_sha256:
            raise UserError(
                f"work unit {index} of {out} was made with another tokenizer (sha256 {result.tokenizer_sha256[:12]}) "
                f"than the plan's ({plan.tokenizer_sha256[:12]}); remove {unit_folder(out, index)} and run again"
            )
        results.append(result)
    return results


def read_result(out: Path, index: int) -> UnitResult:
    """Return the result of a finished work unit; raise UserError if it is damaged."""
    folder = unit_folder(out, index)
    return UnitResult.read(folder / RESULT, f"remove {folder} and run again")
