"""What the sections of a config are made of: strict types, and whether a resumed run may change a key."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, TypeVar

import pydantic

T = TypeVar("T")


class OnResume(Enum):
    """What a config key may do between a checkpoint and the run that resumes it."""

    FIXED = "the losses would not continue with another value"
    FREE = "it may change"


Fixed = Annotated[T, OnResume.FIXED]
Free = Annotated[T, OnResume.FREE]

PositiveInt = Annotated[int, pydantic.Field(ge=1)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0)]


class Section(pydantic.BaseModel):
    """A strict and frozen part of a config. Every key is `Fixed`, `Free`, or a section of its own."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def fixed_keys(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys, and their values, that a resumed run must share with its checkpoint."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if OnResume.FIXED in field.metadata:
            yield key, value
        elif OnResume.FREE not in field.metadata:
            for index, inner in [("", value)] if isinstance(value, Section) else enumerate(value):
                yield from fixed_keys(inner, f"{key}.{index}." if index != "" else f"{key}.")
