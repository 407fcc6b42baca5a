"""The two ways in which lbdet stops on purpose.

Everything else that escapes is a bug of ours. `lbdet.cli` turns these into one line on stderr
and an exit code.
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
    """Return `"; closest: 'x'"` for the name that begins so or is most similar,
    or `""` if nothing is similar.
    """
    names = list(names)
    beginning = [full for full in names if len(name) > 2 and full.startswith(name)]
    matches = beginning or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; closest: {matches[0]!r}" if matches else ""
