"""Does a call ask of its cells what an earlier call asked? Else a curve would hold runs of two recipes."""

from __future__ import annotations

from lbdet.config import differences, load_config
from lbdet.errors import UserError
from lbdet.sweep.cells import Cell
from lbdet.sweep.run import Sweep


def check_recipe(sweep: Sweep, cell: Cell) -> None:
    """Check a cell's config, and that it is the one that its run has, if it was begun already.

    Raises:
        UserError: it is another one, or as `Sweep.config_of`.
    """
    config, run = sweep.config_of(cell), sweep.run(cell)
    found = differences(load_config(run.config), config) if run.config.exists() else ""
    if found:
        raise UserError(
            f"{run.path}: must have the config that it was begun with, got {found}; give the same --config, "
            "--set, --at and spelling of --output, or another --output"
        )
