"""How precise is a layer?

`Precision` for one layer at one moment, `Plan` for all layers at one training step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lbdet.errors import UserError

_PATTERN = re.compile("(?:W([1-9][0-9]*))?(?:A([1-9][0-9]*))?")


@dataclass(frozen=True)
class Precision:
    """Widths of the stored codes in bits, sign and zero included; `None` is float32.

    >>> str(Precision(4, 8)), str(Precision(4)), str(Precision())
    ('W4A8', 'W4', 'float')
    """

    weight_bits: int | None = None
    act_bits: int | None = None

    @classmethod
    def parse(cls, text: str | Precision) -> Precision:
        """Read "W4A8", "W4", "A8" or "float"; a precision is returned as it is.

        Raises:
            UserError: any other text, or what is no text.

        >>> Precision.parse("W4A8")
        Precision(weight_bits=4, act_bits=8)
        """
        if isinstance(text, Precision):
            return text
        if text == "float":
            return cls()
        match = _PATTERN.fullmatch(text) if text and isinstance(text, str) else None
        if match is None:
            raise UserError(
                f"precision must be 'float' or like W4, W4A8, got {text!r}; write for instance W4"
            )
        return cls(*(int(group) if group else None for group in match.groups()))

    def __str__(self) -> str:
        weight = "" if self.weight_bits is None else f"W{self.weight_bits}"
        act = "" if self.act_bits is None else f"A{self.act_bits}"
        return weight + act or "float"


FLOAT = Precision()


@dataclass(frozen=True)
class Plan:
    """The precision of every scheduled layer at one training step."""

    precision: Mapping[str, Precision] = field(default_factory=dict)
    """by layer name"""
    target: Mapping[str, Precision] = field(default_factory=dict)
    """what the phase trains for, by layer name; `precision` differs from it where a layer is left float"""
    phase: int = 0
    """counts the stretches of unchanged `target`, from 0"""
    span: range = range(0)
    """the steps of the phase"""
