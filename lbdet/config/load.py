"""A config file: YAML -> typed values, every error at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lbdet.config.quantizer import ACTIVATIONS, WEIGHTS, OverrideConfig
from lbdet.config.schedule import ConstantConfig
from lbdet.config.schema import Config
from lbdet.config.sentences import sentence, short
from lbdet.errors import UserError
from lbdet.precision import Precision


def load_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key.path=value` settings (values in YAML).

    Setting a format or a schedule by name drops the keys of the one that it replaces.

    Raises:
        UserError: every problem of the file and the settings, one a line.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except _NOT_YAML as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {type(tree).__name__}")
    for setting in settings:
        _set(tree, setting)
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
    """SafeLoader that refuses a key written twice, and aliases (a few bytes of them expand to gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed; write the value again", problem_mark=mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key {key!r} stands twice in one mapping; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: Exception) -> str:
    """Return one line that says where and what, without the excerpt that PyYAML draws."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return f"is not YAML: {' '.join(str(error).split())}"


def _set(tree: dict[str, Any], setting: str) -> None:
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
    if keys[-1] == "format" and section.get("format") != value:
        section.clear()
    if keys == ["schedule", "name"] and section.get("name") != value:
        for key in section.keys() - ConstantConfig.model_fields.keys():  # those that not every schedule has
            del section[key]
    section[keys[-1]] = value


def _validate(tree: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [f"{where}: {sentence(problem)}" for problem in error.errors()]
        raise UserError("\n".join(lines)) from None
