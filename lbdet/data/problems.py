"""What is wrong with a data set: all of it at once, each mistake by its file and object."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lbdet.errors import UserError, one_line

Box = tuple[float, float, float, float]
DataT = TypeVar("DataT")

_SHOWN = 10  # problems listed in one message


@dataclass(frozen=True, slots=True)  # there may be a million
class Problem:
    """One mistake in a data set."""

    where: str
    """in the data set: file and object"""
    rule: str
    """that is broken there, and what was found"""
    kind: str = "annotation"
    """a word or two that problems are counted by"""
    image: str = ""
    """the file of the image that it concerns, where it is one"""
    box: Box | None = None
    """`(x1, y1, x2, y2)` as annotated, 0-based: maybe reversed or outside of the image"""


class Broken(UserError):
    """A broken rule of a kind, with the box where it is about one."""

    def __init__(self, kind: str, rule: str, box: Box | None = None) -> None:
        super().__init__(rule)
        self.kind, self.box = kind, box


def problem(where: str, error: UserError, image: str = "") -> Problem:
    """Return what an error says about an object or a file."""
    if isinstance(error, Broken):
        return Problem(where, str(error), error.kind, image, error.box)
    return Problem(where, str(error), image=image)


@dataclass(frozen=True)
class Scan(Generic[DataT]):
    """What could be read of a data set, and what could not."""

    data: DataT
    """without the objects and images that have a problem which keeps them from being read"""
    problems: tuple[Problem, ...]

    def whole(self, where: str | os.PathLike[str]) -> DataT:
        """Return the data if there is no problem.

        Raises:
            UserError: as `raise_problems`.
        """
        raise_problems(where, self.problems)
        return self.data


def raise_problems(where: str | os.PathLike[str], problems: Sequence[Problem]) -> None:
    """Raise one UserError that lists the problems, if there are any; those that read the same stand once."""
    groups: dict[str, list[str]] = {}
    for found in problems:
        groups.setdefault(found.rule, []).append(found.where)
    lines = [
        f"{one_line(places[0], 200)}: {one_line(rule)}"
        + (f" (and {len(places) - 1} more like this)" if len(places) > 1 else "")
        for rule, places in groups.items()
    ]
    if len(lines) == 1:
        raise UserError(f"{where}: {lines[0]}")
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise UserError("\n  ".join([f"{where}: {len(problems)} problems", *lines[:_SHOWN], *more]))
