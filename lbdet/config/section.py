"""What the sections of a config have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from lbdet.errors import UserError
from lbdet.precision import Precision


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def _parse_precision(value: object) -> object:
    if isinstance(value, Precision):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be 'float' or like W4, got {value!r:.60}")
    try:
        return Precision.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from None


PrecisionText = Annotated[Precision, BeforeValidator(_parse_precision)]
"""written W4A8"""
