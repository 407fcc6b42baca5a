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


def one_line(text: str, limit: int = 400) -> str:
    """Return foreign text as messages show it: printable, in one line, cut behind `limit` characters.

    >>> one_line("a\\nb")
    'a\\\\nb'
    """
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def joined(error: object) -> str:
    """Return what a library's error says, its lines joined.

    >>> joined(ValueError("two\\n  lines"))
    'two lines'
    """
    return " ".join(str(error).split())


def short(value: object) -> str:
    """Return a foreign value as messages show it, in one line of at most 60 characters."""
    try:
        return one_line(repr(value), 60)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists ...
        return f"a huge {type(value).__name__}"
