"""The folder of a run: which files it holds, and who may write into it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from lbdet.data.files import read_bytes, reason
from lbdet.engine.checkpoint import load_checkpoint, save_checkpoint
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.files import write_atomically, write_text

_MAX_LOG = 1 << 30  # bytes of metrics.jsonl, which has some hundred an update


@dataclass(frozen=True)
class RunFolder:
    """Paths and writers of a run; every file but the log is written atomically."""

    path: Path
    writes: bool = True
    """false in all but one of several processes: whatever would change a file does nothing"""

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """The weights as evaluated."""
        return self.path / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Everything to continue."""
        return self.path / "checkpoint.pt"

    @property
    def finished(self) -> bool:
        """Whether the run has its final metrics, which are written last."""
        return (self.path / "metrics.json").exists()

    def refuse(self, resume: bool) -> None:
        """Check that a run may begin here, or go on; nothing is written.

        Raises:
            UserError: the folder holds a run, or a part of one, and `resume` is false or its config
                is missing.
        """
        if not (self.config.exists() or self.checkpoint.exists() or self.finished):
            return
        if not resume:
            raise UserError(
                f"{self.path}: holds a run already; give --resume to continue it, or another --output"
            )
        if not self.config.exists():
            raise UserError(
                f"{self.path}: the run must have its config.yaml to be resumed, got none; "
                "give another --output"
            )

    def start(self, config: str) -> None:
        """Make the folder and write the config.

        Raises:
            UserError: the folder cannot be made or written.
        """
        self._make()
        self.write_text("config.yaml", config)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and keep other processes from writing into it; a crash frees it.

        Raises:
            UserError: another process has it, or the folder cannot be made or written.
        """
        if not self.writes:
            yield
            return
        self._make()
        path = self.path / ".lock"
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "w"))
            except OSError as error:
                raise UserError(f"{path}: cannot be written: {error.strerror}") from None
            if not _locked(file.fileno(), path):
                raise UserError(
                    f"{self.path}: another process is writing this run; wait for it, or give another --output"
                )
            stack.callback(path.unlink, missing_ok=True)
            yield

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        if not self.writes:
            return
        write_text(self.path / name, text)

    def write_json(self, name: str, value: object, indent: int | None = 1) -> None:
        """Write plain data."""
        self.write_text(name, json.dumps(value, indent=indent) + "\n")

    def _make(self) -> None:
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made: {error.strerror}") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def forget_log_after(self, step: int) -> None:
        """Drop the lines of updates after `step`, which a resumed run will write again."""
        path = self.path / "metrics.jsonl"
        try:
            text = read_bytes(path, _MAX_LOG).decode(errors="replace") if path.exists() else ""
        except OSError as error:
            raise UserError(f"{path}: cannot be read, got {reason(error)}") from None
        lines = text.splitlines()
        kept = [line for line in lines if _step(line) <= step]
        self.write_text("metrics.jsonl", "".join(f"{line}\n" for line in kept))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        if not self.writes:
            return
        save_checkpoint(self.checkpoint, state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the checkpoint, or None where there is none yet; say so if it is the one before."""
        if not self.checkpoint.exists():
            return None
        state, remark = load_checkpoint(self.checkpoint)
        if remark:
            say(remark)
        return state

    def save_model(self, model: nn.Module, architecture: str, classes: Sequence[str], precision: str) -> None:
        """Write the state dict as safetensors; the file itself says which model and classes it is for, and
        the precision that it was trained at.
        """
        if not self.writes:
            return
        tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        metadata = {
            "architecture": architecture, "classes": json.dumps(list(classes)), "precision": precision,
        }  # fmt: skip
        content = save(tensors, metadata)
        write_atomically(self.model, lambda file: file.write_bytes(content))


def _locked(file: int, path: Path) -> bool:
    """Try to lock an open file; it must still be the one at `path`, which the last owner may have removed.

    The lock is this process' alone: those that load images do not inherit it and keep it when this one dies.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _step(line: str) -> int:
    """Return a log line's step; a line cut short by a crash, or damaged, belongs to no step that is kept."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 1 << 62
