"""Everything that a run needs to go on, in a file that is checked when it is read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lbdet.errors import UserError
from lbdet.files import write_atomically
from lbdet.models.plain import load_plain


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
