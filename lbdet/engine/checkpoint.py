"""Files that are whole or not there: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lbdet.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, then rename the file to `path`;
    a crash leaves the old file or the new one.

    Raises:
        UserError: the disk is full, the folder is read-only, and the like.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing but tensors and plain data is accepted, so no code in it can run.

    Raises:
        UserError: the file is damaged or no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise nearly anything in the unpickler
        raise UserError(
            f"{path}: is no readable checkpoint ({type(error).__name__}); remove it to start the run again"
        ) from None
    if not isinstance(state, dict) or not {"networks", "step", "total_steps"} <= state.keys():
        raise UserError(f"{path}: is no checkpoint of a run; remove it to start the run again")
    return state
