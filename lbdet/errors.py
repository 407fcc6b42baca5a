"""The two ways in which lbdet stops on purpose.

Everything else that escapes is a bug of ours. `lbdet.cli` turns these into one line on stderr and an exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user wrote or supplied (exit code 2).

    The text is the whole message: `<where>: <rule>, got <value>; <remedy>`.
    """


class NumericsError(Exception):
    """The numbers failed, such as a loss that is not finite (exit code 3)."""


def closest(name: str, names: Iterable[str]) -> str:
    """Return `"; closest: 'x'"` for the most similar of `names`, or `""` if nothing is similar."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; closest: {matches[0]!r}" if matches else ""
