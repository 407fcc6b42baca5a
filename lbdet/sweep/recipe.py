"""Does a call ask of its cells what an earlier call asked? Else a curve would hold runs of two recipes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from lbdet.config import Config, dump_config, load_config
from lbdet.errors import UserError, one_line, short
from lbdet.sweep.cells import Cell
from lbdet.sweep.run import Sweep

_SHOWN = 5  # differences listed in one message


def check_recipe(sweep: Sweep, cell: Cell) -> None:
    """Check a cell's config, and that it is the one that its run has, if it was begun already.

    Raises:
        UserError: it is another one, or as `Sweep.config_of`.
    """
    config, run = sweep.config_of(cell), sweep.run(cell)
    before = load_config(run.config) if run.config.exists() else config
    if config != before:
        found = list(_differences(_tree(before), _tree(config)))
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(
            f"{run.path}: must have the config that it was begun with, got {', '.join(found[:_SHOWN])}{more}"
            "; give the same --config, --set and --at, or another --output"
        )


def _tree(config: Config) -> dict[str, Any]:
    return yaml.safe_load(dump_config(config))


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield `train.lr 0.002 (was 0.0005)` for each key that has another value."""
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{one_line(f'{path}{key}')} {short(new)} (was {short(old)})"
