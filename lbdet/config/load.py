"""A config file: YAML -> typed values, every error at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from lbdet.config.quantizer import ACTIVATIONS, WEIGHTS, OverrideConfig
from lbdet.config.schedule import ConstantConfig
from lbdet.config.schema import Config
from lbdet.config.sentences import sentence
from lbdet.data.files import read_text, reason
from lbdet.errors import UserError, joined, one_line, short
from lbdet.precision import Precision

MAX_CONFIG = 1 << 18
"""Bytes of a config file; a published one has about 2000."""
_MAX_DEPTH = 20  # a config has 5 levels
_SHOWN = 30  # problems listed in one message


def load_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key.path=value` settings (values in YAML).

    Setting a format or a schedule by name drops those keys of the one that it replaces that no earlier
    setting gave by name.

    Raises:
        UserError: every problem of the file and the settings, one a line.
    """
    try:
        tree = yaml.load(read_text(path, MAX_CONFIG), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    except _NOT_YAML as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {type(tree).__name__}")
    given: set[tuple[str, ...]] = set()
    for setting in settings:
        given.add(_set(tree, setting, given))
    return _validate(tree, str(path))


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            fields = {k: plain(getattr(value, k)) for k in type(value).model_fields}
            return _without_none(fields) if isinstance(value, _SPARSE) else fields
        if isinstance(value, Precision):
            return str(value)
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return yaml.safe_dump(plain(config), sort_keys=False)


_SPARSE = (OverrideConfig, *WEIGHTS.values(), *ACTIVATIONS.values())
"""sections in which null does not stand for itself"""


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if v is not None}


_NOT_YAML = (
    yaml.YAMLError,
    ValueError,
    RecursionError,
)  # ValueError: no UTF-8, an impossible date, a huge number


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what no config needs: a key twice, other keys than texts, tags, depth, and
    aliases, a few bytes of which expand to gigabytes."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases are not allowed; write the value again", event)
        if event.tag is not None:  # SafeLoader trips over !!bool x and the like
            self._refuse(f"tags are not allowed, got {short(event.tag)}; write the plain value", event)
        if self.depth == _MAX_DEPTH:  # the time that PyYAML takes grows with its square
            self._refuse("values must not be nested so deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._refuse(f"keys must be texts, got {short(key)}", key_node)
            if key in seen:
                self._refuse(f"key {short(key)} stands twice in one mapping; remove one", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(problem: str, place: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _yaml_problem(error: Exception) -> str:
    """Return one line that says where and what, without the excerpt that PyYAML draws."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        words = [error.context or "", error.problem] if error.problem.startswith("but ") else [error.problem]
        return f"{place}: {one_line(', '.join(words))}"
    return f"is not YAML: {one_line(joined(error))}"


def _set(tree: dict[str, Any], setting: str, given: Set[tuple[str, ...]]) -> tuple[str, ...]:
    """Apply a setting to the tree and return its path; `given` holds the paths of those before it."""
    path, equals, text = setting.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set: must be like train.epochs=1, got {setting!r}")
    try:
        value = yaml.load(text, _Loader)
    except _NOT_YAML as error:
        raise UserError(f"--set {short(setting)}: {_yaml_problem(error)}") from None
    section = tree
    for key in keys[:-1]:
        if not isinstance(section.get(key), dict):
            section[key] = {}
        section = section[key]
    of_all = {"format": set(), "name": ConstantConfig.model_fields.keys()}  # keys that any other has too
    chooses = keys[-1] == "format" or keys == ["schedule", "name"]
    if chooses and section.get(keys[-1]) != value:
        for key in section.keys() - of_all[keys[-1]]:
            if (*keys[:-1], key) not in given:
                del section[key]
    section[keys[-1]] = value
    return tuple(keys)


def _validate(tree: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"{where}: {one_line(sentence(problem))}" for problem in problems[:_SHOWN]]
        more = [f"{where}: ... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise UserError("\n".join(lines + more)) from None
