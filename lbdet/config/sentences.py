"""What pydantic found, in our words: where, the rule, what was found, the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args

from lbdet.config.quantizer import ACTIVATIONS, WEIGHTS, OverrideConfig
from lbdet.config.schedule import SCHEDULES
from lbdet.config.schema import Config
from lbdet.errors import closest, short

_SECTIONS: dict[str, dict[str, Any]] = {
    "weight": WEIGHTS, "activation": ACTIVATIONS, "schedule": SCHEDULES,
}  # fmt: skip
"""the keys whose content depends on a name in it"""


def sentence(problem: Any) -> str:
    """Turn one of pydantic's problems into `key.path: rule, got value; remedy`."""
    location = [str(key) for key in problem["loc"]]
    keys = [key for i, key in enumerate(location) if not _is_tag(location, i)]
    path, got = ".".join(keys), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            beside = _keys_beside(location)
            return f"{path}: unknown key" + (closest(keys[-1], beside) or f"; keys here: {', '.join(beside)}")
        case "missing":
            return f"{path}: must be given"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case "union_tag_invalid" | "union_tag_not_found":
            tag = "name" if keys[-1] == "schedule" else "format"
            name = got.get(tag) if isinstance(got, dict) else got
            known = _SECTIONS[keys[-1]]
            names = ", ".join(map(repr, known))
            hint = closest(name[:60], known) if isinstance(name, str) else ""
            return f"{path}.{tag}: must be one of {names}, got {short(name)}{hint}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{path}: must be a mapping of keys, got {short(got)}"
        case "too_short":
            return f"{path}: must not be empty, got {short(got)}"
        case "int_parsing" | "int_from_float" | "int_type":
            return f"{path}: must be a whole number, got {short(got)}"
        case "float_parsing" | "float_type":
            return f"{path}: must be a number, got {short(got)}"
        case "bool_parsing" | "bool_type":
            return f"{path}: must be true or false, got {short(got)}"
    rule = problem["msg"].removeprefix("Input ").replace("should", "must")
    return f"{path}: {rule[0].lower()}{rule[1:]}, got {short(got)}"


def _is_tag(location: Sequence[str], i: int) -> bool:
    """Whether an entry is not a key of the file but the name that pydantic chose a section by."""
    return i > 0 and location[i] in _SECTIONS.get(location[i - 1], {})


def _keys_beside(location: Sequence[str]) -> list[str]:
    """Return the keys that exist where an unknown one was written, last in `location`."""
    section: Any = Config
    for i, key in enumerate(location[:-1]):
        if _is_tag(location, i):
            section = _SECTIONS[location[i - 1]][key]
        elif location[i - 1 : i] == ["overrides"]:
            section = OverrideConfig
        else:
            section = section.model_fields[key].annotation
            section = next((s for s in get_args(section) if s is not NoneType), section)  # X | None
    return list(section.model_fields)
