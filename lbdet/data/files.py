"""Read whole files of unknown origin: regular ones, of a bounded size."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import BinaryIO


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


def reason(error: Exception) -> str:
    """Return why a file cannot be read, without the file's name, which a message says already."""
    strerror = error.strerror if isinstance(error, OSError) else None
    text = strerror or str(error) or type(error).__name__
    return re.sub(" object at 0x[0-9a-f]+", "", text)
