"""What the sections of a study's file have in common."""

from __future__ import annotations

from typing import Annotated

import pydantic

PositiveInt = Annotated[int, pydantic.Field(ge=1)]


class Part(pydantic.BaseModel):
    """A strict and frozen part of a study."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
