"""In what do two configs differ?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lbdet.config.load import dump_config
from lbdet.config.schema import Config
from lbdet.errors import one_line, short

_SHOWN = 5  # differences in one message


def differences(before: Config, now: Config) -> str:
    """Return `train.lr 0.002 (was 0.0005)` for the first keys that have another value, "" where none has."""
    trees = (yaml.safe_load(dump_config(config)) for config in (before, now))
    found = list(_differences(*trees))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{one_line(f'{path}{key}')} {short(new)} (was {short(old)})"
