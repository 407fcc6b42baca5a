"""Read whole files of unknown origin: regular ones, of a bounded size."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

from lbdet.errors import UserError, short

MAX_JSON = 64 << 20
"""Bytes of a JSON file about a run, such as its metrics."""

_PREPARED = {
    "voc_subset": "tools/prepare_voc_subset.py",
    "cifar10_10k_2k.npz": "tools/prepare_cifar10_10k.py",
}
"""data sets that nobody offers, by the tool that makes each of official ones"""


def prepared_by(root: str | os.PathLike[str]) -> str | None:
    """Return the tool that makes the data set of this name; None for one that others offer, or the user's."""
    return _PREPARED.get(os.path.basename(os.path.normpath(root)))


def check_root(root: str | os.PathLike[str]) -> None:
    """Refuse a data set that is not there, and say how to get it.

    Raises:
        UserError: there is no such file or folder.
    """
    if not os.path.exists(root):
        tool = prepared_by(root)
        remedy = f"make it with {tool}" if tool else "see datasets/README.md"
        raise UserError(f"{root}: data set does not exist; {remedy}")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: it cannot be opened, or is a pipe or a device, which may never end.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open() has its own words for a folder
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"a file of more than {limit >> 10} KiB")
    return content


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """Return the content of a file of at most `limit` bytes in UTF-8, without its byte order mark.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(
    path: str | os.PathLike[str],
    limit: int = MAX_JSON,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """Read a JSON file of at most `limit` bytes in which no key stands twice in an object.

    Args:
        parse_constant: what becomes of NaN and the infinities, for which JSON has no word; None = floats.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        text = read_text(path, limit)
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=parse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be JSON in UTF-8, got {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read, got {reason(error)}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise UserError(f"{path}: must be JSON, got {error}") from error


def reason(error: Exception) -> str:
    """Return why a file cannot be read, without the file's name, which a message says already."""
    strerror = error.strerror if isinstance(error, OSError) else None
    text = strerror or str(error) or type(error).__name__
    return re.sub(" object at 0x[0-9a-f]+", "", text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short(key)} twice in one object")
    return found
