"""Plans as a table for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tostlm.files import aligned, format_bytes
from tostlm.plan.memory import Memory
from tostlm.plan.plan import Plan
from tostlm.plan.timing import StepTime

Cell = Callable[[Plan], str]


def report_plans(name: str, plans: Sequence[Plan], as_json: bool) -> str:
    """Return the plans of a run, a column each, by the run's `name`; or all their numbers as JSON."""
    if as_json:
        return json.dumps({"config": name, "plans": [_numbers(plan) for plan in plans]}, indent=2)
    first = plans[0]
    head = (
        f"{name}: {first.parameters:,} parameters, {first.flops_per_token:.3g} operations a token, "
        f"checkpoints of {format_bytes(first.checkpoint_bytes)}; on {first.device}"
    )
    rows = [["", *map(_place, plans)], *([title, *map(cell, plans)] for title, cell in _rows())]
    rows = [row for row in rows if any(row[1:])]
    return "\n".join([head, aligned(rows, left=(0,)), *_advice(plans)])


def _rows() -> list[tuple[str, Cell]]:
    """Return the table's rows: the title of each, and how it shows a plan."""
    return [
        ("passes of a step", lambda plan: str(plan.accumulation)),
        ("memory of each", lambda plan: _bytes(plan.memory.total)),
        *((f"  {part}", lambda plan, part=part: _bytes(getattr(plan.memory, part))) for part in Memory._fields),
        ("usable", lambda plan: _bytes(plan.usable_bytes or 0)),
        ("sent by each in a step", lambda plan: _bytes(plan.sent_bytes)),
        ("step", lambda plan: _milliseconds(plan.step.total)),
        *((f"  {part}", lambda plan, part=part: _milliseconds(getattr(plan.step, part))) for part in StepTime._fields),
        ("tokens/s", lambda plan: f"{plan.tokens_per_second:,.0f}"),
        ("of the peak", lambda plan: f"{plan.utilization:.0%}"),
        ("days", lambda plan: f"{plan.days:.3g}"),
        ("GPU-hours", lambda plan: f"{plan.gpu_hours:,.0f}"),
        ("kWh", lambda plan: f"{plan.kilowatt_hours:,.0f}"),
        ("price", lambda plan: "" if plan.price is None else f"{plan.price:,.0f}"),
        ("a checkpoint takes", lambda plan: f"{plan.checkpoint_seconds:.3g} s"),
    ]


def _place(plan: Plan) -> str:
    return f"{plan.nodes} x {plan.gpus // plan.nodes}"


def _advice(plans: Sequence[Plan]) -> list[str]:
    """Return lines on what does not fit, and on what may be better."""
    return [
        f"{_place(plan)}{'' if plan.fits else ' does not fit'}: {'; '.join(plan.advice)}"
        for plan in plans
        if plan.advice
    ]


def _numbers(plan: Plan) -> dict[str, Any]:
    nested = {name: getattr(plan, name)._asdict() for name in ("memory", "traffic", "step")}
    return {**plan._asdict(), **nested, "memory_total": plan.memory.total, "fits": plan.fits}


def _bytes(size: float) -> str:
    return format_bytes(size) if size else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds else ""
