"""Files that are whole or not there: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lbdet.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Call `write` with a temporary path, then rename the file to `path`;
    a crash leaves the old file or the new one.

    Args:
        keep: where the old file, if there is one, stays.

    Raises:
        UserError: the disk is full, the folder is read-only, and the like.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically.

    Raises:
        UserError: as `write_atomically`.
    """
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _keep(path: Path, kept: Path) -> None:
    """Give a file a second name, in place of what has it; the file stays where it is at every moment."""
    link = kept.with_name(f".{kept.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        shutil.copyfile(path, link)
    os.replace(link, kept)
