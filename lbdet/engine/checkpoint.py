"""Files that are whole or not there: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lbdet.errors import UserError
from lbdet.models.plain import load_plain


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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data, atomically; the checkpoint before stays beside it."""
    content = io.BytesIO()  # torch's own writer meets a full disk with a RuntimeError
    torch.save(state, content)
    write_atomically(path, lambda file: file.write_bytes(content.getbuffer()), keep=previous(path))


def previous(path: Path) -> Path:
    """Return where the checkpoint before is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> tuple[dict[str, Any], str]:
    """Read a checkpoint, or the one before it where this one is damaged.

    Every byte is checked against the file's own checksums (CRC-32). Nothing but tensors and plain data is
    accepted, so no code in it can run.

    Returns:
        The state, and a line for the user where the one before was taken, else "".

    Raises:
        UserError: both are damaged, missing or no checkpoints.
    """
    try:
        return _read(path), ""
    except UserError as error:
        before = previous(path)
        if not before.exists():
            raise
        return _read(before), f"{error}; {before.name}, the one before, is taken"


def _read(path: Path) -> dict[str, Any]:
    try:
        state = load_plain(path, checksums=True)
    except Exception as error:  # damaged bytes can raise nearly anything in the unpickler
        raise UserError(
            f"{path}: is no readable checkpoint ({type(error).__name__}); remove it to start the run again"
        ) from None
    if not isinstance(state, dict) or not {"networks", "step", "total_steps"} <= state.keys():
        raise UserError(f"{path}: is no checkpoint of a run; remove it to start the run again")
    return state


def _keep(path: Path, kept: Path) -> None:
    """Give a file a second name, in place of what has it; the file stays where it is at every moment."""
    link = kept.with_name(f".{kept.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        shutil.copyfile(path, link)
    os.replace(link, kept)
