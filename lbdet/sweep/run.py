"""One cell of a sweep: its run folder is trained, continued or found finished, then packed and timed."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lbdet.build import build_task, load_run, read_data
from lbdet.config import Config, load_config
from lbdet.deploy.certify import describe, pack
from lbdet.engine.latency import latency_ms
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.signals import Interrupted
from lbdet.errors import NumericsError, UserError, joined
from lbdet.experiment import train_run
from lbdet.precision import Precision
from lbdet.sweep.cells import Cell
from lbdet.sweep.facts import LATENCY, PACKED, facts, is_measured


@dataclass(frozen=True)
class Sweep:
    """What all cells share."""

    config: str
    """the file"""
    settings: tuple[str, ...]
    """`--set` for every cell"""
    folder: Path
    """holds sweep.json and cells/"""
    at: Mapping[Precision, Sequence[str]] = field(default_factory=dict)
    """more settings for the qat cells of a precision"""

    @property
    def cells(self) -> Path:
        """Where the cells' run folders lie."""
        return self.folder / "cells"

    def run(self, cell: Cell) -> RunFolder:
        """Return a cell's run folder."""
        return RunFolder(self.cells / cell.name)

    def config_of(self, cell: Cell) -> Config:
        """Return a cell's config.

        Raises:
            UserError: a precision that a format cannot do, or whatever is wrong with the file.
        """
        return load_config(self.config, self._settings(cell))

    def command_of(self, cell: Cell, tool: str) -> str:
        """Return the command by which `tool`, such as train_det.py, makes the cell's run by itself."""
        settings = " ".join(shlex.quote(setting) for setting in self._settings(cell))
        output = shlex.quote(str(self.run(cell).path))
        return f"python tools/{tool} --config {shlex.quote(self.config)} --set {settings} --output {output}"

    def _settings(self, cell: Cell) -> Sequence[str]:
        at = self.at.get(cell.precision, ()) if cell.mode == "qat" else ()
        return [*self.settings, *at, *cell.settings(self.cells)]


def run_cell(sweep: Sweep, cell: Cell) -> str | None:
    """Bring a cell to its end; nothing happens if it was there already.

    Returns:
        What went wrong in one line, None if nothing did. A traceback of a bug of ours goes to stderr.

    Raises:
        Interrupted: a signal came; the cell can be continued.
    """
    run = sweep.run(cell)
    try:
        train_run(sweep.config_of(cell), run, resume=True)
        _measure(run, cell)
        facts(run)
    except (UserError, NumericsError) as error:
        return joined(error)
    except Interrupted as error:
        raise Interrupted(
            error.signum, f"{cell.name}: interrupted, saved; the same command goes on"
        ) from None
    except Exception as error:  # a bug must not stop the other cells
        traceback.print_exc()
        return f"{type(error).__name__}: {joined(error)[:200]}"
    return None


def _measure(run: RunFolder, cell: Cell) -> None:
    """Write the packed file and then the latency of a finished run into its folder, if they are not there."""
    if is_measured(run):
        return
    built = load_run(run.path)
    config = built.config
    val = read_data(config.data, config.data.val)
    facts = describe(built.model, config.model.name, built.classes, val, config.model.image_size)
    pack(built.model, run.path / PACKED, facts, cell.precision, fold=True)
    run.write_json(LATENCY, {"ms": latency_ms(built.model, build_task(config), val)})
