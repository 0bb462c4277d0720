"""The plan of a preparation: which work units there are and with which settings each is tokenized.

An unfinished folder holds

    plan.json           the settings and the work units
    tokenizer file
    units/00012/        the shards of a finished work unit, and result.json; the folder appears whole or not at all

Every process that takes part, on any machine, reads the plan there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

import pydantic

from tostlm.data.preparation.selection import Selection, Selector
from tostlm.data.preparation.sources import UNIT_BYTES, FileState, WorkUnit, list_work_units
from tostlm.data.shards import MANIFEST, FrozenModel, Shard, dtype_for, read_manifest
from tostlm.data.tokenizers import Tokenizer
from tostlm.data.verification import check_sizes
from tostlm.errors import UserError
from tostlm.files import locked, require_writable, write_atomically

PLAN = "plan.json"
UNITS = "units"
RESULT = "result.json"
LOCK = ".plan.lock"
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

    def is_same(self, other: PreparationPlan) -> bool:
        """Return whether the plans lead to the same shards."""
        own, others = (plan.model_dump(exclude={"command": True, "settings": MAY_CHANGE}) for plan in (self, other))
        return own == others


class UnitResult(FrozenModel):
    """The content of a finished work unit's result.json."""

    tokenizer_sha256: str
    files: dict[str, FileState]  # of the source, by path
    dropped: dict[str, int]
    examples: list[dict[str, str]]  # reason, document and detail of the first documents dropped
    shards: dict[str, tuple[Shard, ...]]  # by split


def unit_folder(out: Path, index: int) -> Path:
    return out / UNITS / f"{index:05d}"


def finished(settings: PreparationSettings, tokenizer: Tokenizer, out: Path) -> bool:
    """Return whether `out` is a prepared folder.

    Raises:
        UserError: it is one, of other settings or another tokenizer, or one that lacks a shard.
    """
    if not (out / MANIFEST).exists():
        return False
    made = check_sizes(out)
    started = {**made.settings, "sources": list(made.sources), "heldout_fraction": made.heldout_fraction}
    if difference := _difference(started, made.tokenizer_sha256, settings, tokenizer):
        raise UserError(f"{out} is prepared already, {difference}; remove it, or choose another --out")
    return True


def make_plan(settings: PreparationSettings, tokenizer: Tokenizer, out: Path, command: str) -> PreparationPlan:
    """Return the plan in `out`; make the folder and the plan if there is none.

    A plan with other settings is made again as long as no document is finished.

    Raises:
        UserError: `out` holds something else, or finished documents of other settings; a setting or the tokenizer
            cannot be used.
    """
    dtype_for(tokenizer.vocab_size)
    if (loss := tokenizer.find_lossy_text()) and not settings.allow_lossy:
        raise UserError(f"the tokenizer loses text: {loss}; use a lossless one, or accept that with --allow-lossy")
    Selector(settings)
    for folder in settings.dedup_against:
        read_manifest(folder)
    new = None if (out / PLAN).exists() else _new_plan(settings, tokenizer, out, command)
    require_writable(out)
    with locked(out / LOCK):  # tasks that start together agree on the plan of the first
        continues = (out / PLAN).exists()
        plan = read_plan(out) if continues else None
        if plan is None or _is_given_up(plan, settings, tokenizer, out):
            continues = False
            plan = new or _new_plan(settings, tokenizer, out, command)
            for file in out.glob("tokenizer.*"):
                file.unlink()
        if continues:
            _require_same_files(plan, out)
        plan = plan.model_copy(update={"settings": settings})  # which may differ in `MAY_CHANGE`
        if not continues or plan != read_plan(out):
            write_atomically(out / PLAN, plan.model_dump_json(indent=1))
        write_atomically(out / tokenizer.file_name, tokenizer.content, overwrite=False)
    return plan


def _new_plan(settings: PreparationSettings, tokenizer: Tokenizer, out: Path, command: str) -> PreparationPlan:
    for source in settings.sources:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--out {out} lies in the source {source}, which it would change; choose an --out outside of it"
            )
    own = (PLAN, UNITS, tokenizer.file_name)
    if out.exists() and not (out.is_dir() and all(p.name in own or p.name[0] == "." for p in out.iterdir())):
        raise UserError(f"{out} exists and is no prepared data; choose an --out that does not exist")
    units = tuple(list_work_units(settings.sources, settings.unit_bytes))
    return PreparationPlan(command=command, settings=settings, tokenizer_sha256=tokenizer.sha256, units=units)


def _difference(
    started: Mapping[str, object], tokenizer_sha256: str, settings: PreparationSettings, tokenizer: Tokenizer
) -> str | None:
    """Return what differs from the settings and the tokenizer that a preparation was started with."""
    if tokenizer_sha256 != tokenizer.sha256:
        return "with another tokenizer"
    requested = settings.model_dump(mode="json")
    for key, value in started.items():
        if key not in MAY_CHANGE and value != requested.get(key):
            return f"with {key}={value}, not {requested.get(key)}"
    return None


def _is_given_up(plan: PreparationPlan, settings: PreparationSettings, tokenizer: Tokenizer, out: Path) -> bool:
    """Return whether a plan has other settings and no document; its work units are removed then.

    Raises:
        UserError: it has other settings and finished documents, or is being worked on.
    """
    difference = _difference(plan.settings.model_dump(mode="json"), plan.tokenizer_sha256, settings, tokenizer)
    if difference is None:
        return False
    done = set(range(len(plan.units))) - set(unfinished(out, plan))
    if any(any(read_result(out, index).shards.values()) for index in done):
        raise UserError(f"{out} was started {difference}; use the same, or choose another --out")
    for lock in (out / UNITS).glob(".*.lock"):
        with locked(lock, f"another tostlm prepare works in {out}, {difference}; wait for it or end it"):
            pass
    shutil.rmtree(out / UNITS, ignore_errors=True)
    return True


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
        if Path(file).resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{file} is of the preparation itself, but a source names it; choose an --out that none does"
            )
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
