"""What the sections of a config have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from lbdet.errors import UserError, short
from lbdet.precision import Precision

_MAX_BITS = 32
"""that a width is at all considered with; schedules go through all widths below their first"""


@dataclass(frozen=True)
class _Bool:
    """A bool where none belongs: YAML reads yes and on so, and pydantic would take it for 1."""

    value: bool

    def __repr__(self) -> str:
        return repr(self.value)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_is_a_number(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        wants_bool = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        return {
            key: _Bool(value) if isinstance(value, bool) and key not in wants_bool else value
            for key, value in values.items()
        }


def _parse_precision(value: object) -> object:
    if isinstance(value, Precision):
        return value
    if not isinstance(value, str) or len(value) > 20:
        raise ValueError(f"must be 'float' or like W4, got {short(value)}")
    try:
        precision = Precision.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from None
    if max(precision.weight_bits or 0, precision.act_bits or 0) > _MAX_BITS:
        raise ValueError(f"must have at most {_MAX_BITS} bits, got {value}; float is wider than all")
    return precision


PrecisionText = Annotated[Precision, BeforeValidator(_parse_precision)]
"""written W4A8"""
