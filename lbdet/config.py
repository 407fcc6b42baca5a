"""The schema of a config: YAML -> typed values, every error at once.

A config is complete and stands alone: no inheritance between files, no interpolation. Paths are relative to
the current directory. Only this file, `build.py` and `cli/` know the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lbdet.convert import WeightFormat, check_width
from lbdet.errors import UserError, closest
from lbdet.precision import Precision

Granularity = Literal["per_tensor", "per_channel"]


def _parse_precision(value: object) -> object:
    if isinstance(value, Precision):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be 'float' or like W4, got {_short(value)}")
    try:
        return Precision.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def _name_or_names(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"must be a name, a file or a list of names, got {_short(value)}")


PrecisionText = Annotated[Precision, BeforeValidator(_parse_precision)]
ClassNames = Annotated[str | list[str], BeforeValidator(_name_or_names)]
"""a name (voc20, coco80), a list, or a file with one a line"""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which detector, and what it starts from."""

    name: str
    weights: str | None = None
    """a .safetensors or .pth file, or torchvision's own by name, such as COCO_V1"""
    weights_backbone: str | None = None
    """a classifier's weights for the backbone alone"""
    weights_classes: ClassNames | None = None
    """the classes of the predictors in `weights`, where the file does not say"""
    batch_norm: Literal["train", "frozen"] = "train"
    image_size: int | None = Field(default=None, ge=32)
    """short side of Faster R-CNN's input in pixels; SSDs have a fixed one"""


class DataConfig(_Section):
    """Which images and classes; what `train` and `val` mean depends on `name`, see datasets/README.md."""

    name: str
    root: str
    train: list[str] = Field(min_length=1)
    val: list[str] = Field(min_length=1)
    classes: ClassNames
    other_classes: Literal["error", "ignore"] = "error"
    score_classes: list[str] | None = Field(default=None, min_length=1)
    """the classes that the mean AP is over; null = all"""
    augment: str = "flip"
    """none, flip, ssd, ssdlite, multiscale, or an albumentations YAML"""


class LbwConfig(_Section):
    """Zero and powers of two."""

    format: Literal["lbw"]
    solver: Literal["exact", "semi"] = "exact"
    granularity: Granularity = "per_channel"
    ratio: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ratio_belongs_to_semi(self) -> LbwConfig:
        if self.ratio is not None and self.solver != "semi":
            raise ValueError(f"ratio is for solver 'semi', got solver {self.solver!r}; leave it out")
        return self


class UniformConfig(_Section):
    """Equally spaced values."""

    format: Literal["uniform"]
    granularity: Granularity = "per_channel"


WeightConfig = Annotated[LbwConfig | UniformConfig, Field(discriminator="format")]


def weight_format(config: LbwConfig | UniformConfig) -> WeightFormat:
    """Return the number format that a config section describes."""
    return WeightFormat(config.format, config.model_dump(exclude={"format"}, exclude_none=True))


class OverrideConfig(_Section):
    """What the layers of one pattern have instead."""

    precision: PrecisionText | None = None
    weight: WeightConfig | None = None


class QuantizerConfig(_Section):
    """How numbers are represented; how many bits they have stands in the schedule."""

    weight: WeightConfig = LbwConfig(format="lbw")
    overrides: dict[str, OverrideConfig] = {}
    keep_float: list[str] = []


class ScheduleConfig(_Section):
    """How precise each layer is at each step."""

    name: Literal["constant"] = "constant"
    target: PrecisionText


class TrainConfig(_Section):
    """The training loop."""

    epochs: int = Field(default=6, ge=0)
    max_steps: int | None = Field(default=None, ge=0)
    """stop after this many updates; 0 = the weights as loaded"""
    batch_size: int = Field(default=16, ge=1)
    accumulate: int = Field(default=1, ge=1)
    """batches an update"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=5e-4, gt=0, le=1e30)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """of sgd; adamw has (0.9, 0.999)"""
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_steps: int = Field(default=50, ge=0)
    lr_curve: Literal["cosine", "steps"] = "cosine"
    lr_milestones: list[float] = [0.67, 0.89]
    """shares of all steps at which `lr_curve: steps` divides the rate by 10"""
    clip_norm: float | None = Field(default=None, gt=0)
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """null = at the end of each epoch"""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """decay of the averaged weights that are evaluated and saved; null = no average"""
    amp: bool = False
    workers: int = Field(default=1, ge=0)
    freeze_bn_after: float | None = Field(default=None, ge=0, lt=1)
    """share of all steps after which batch norm keeps its statistics; null = as model.batch_norm says"""
    correct_bn: int = Field(default=0, ge=0)
    """training images on which batch norm is adapted to the error of the weights before training; 0 = not"""
    recalibrate_bn: int = Field(default=0, ge=0)
    """training images that batch norm statistics are measured again on after training"""


class EvalConfig(_Section):
    """The evaluation at the end of a run, and on the way."""

    max_images: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    every_epochs: int | None = Field(default=None, ge=1)
    """also while training, on the first 200 images; null = never"""


class Config(_Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    quantizer: QuantizerConfig = QuantizerConfig()
    schedule: ScheduleConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _formats_can_do_the_widths(self) -> Config:
        try:
            check_width(weight_format(self.quantizer.weight).build(), self.schedule.target, "schedule.target")
            for pattern, override in self.quantizer.overrides.items():
                quantizer = weight_format(override.weight or self.quantizer.weight).build()
                wanted = override.precision or self.schedule.target
                check_width(quantizer, wanted, f"quantizer.overrides.{pattern}")
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


def load_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key.path=value` settings (values in YAML).

    Setting a format by name drops the keys of the format that it replaces.

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
            return fields if not isinstance(value, OverrideConfig | LbwConfig) else _without_none(fields)
        if isinstance(value, Precision):
            return str(value)
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return yaml.safe_dump(plain(config), sort_keys=False)


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
        raise UserError(f"--set {_short(setting)}: {_yaml_problem(error)}") from None
    section = tree
    for key in keys[:-1]:
        if not isinstance(section.get(key), dict):
            section[key] = {}
        section = section[key]
    if keys[-1] == "format" and section.get("format") != value:
        section.clear()
    section[keys[-1]] = value


def _validate(tree: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [f"{where}: {_sentence(problem)}" for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def _sentence(problem: Any) -> str:
    """Turn one of pydantic's problems into `key.path: rule, got value; remedy`."""
    keys = [str(key) for key in problem["loc"] if key not in ("lbw", "uniform")]
    path, got = ".".join(keys), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            beside = _keys_beside(keys)
            return f"{path}: unknown key" + (closest(keys[-1], beside) or f"; keys here: {', '.join(beside)}")
        case "missing":
            return f"{path}: must be given"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case "union_tag_invalid" | "union_tag_not_found":
            name = got.get("format") if isinstance(got, dict) else got
            return f"{path}.format: must be one of 'lbw', 'uniform', got {_short(name)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{path}: must be a mapping of keys, got {_short(got)}"
        case "too_short":
            return f"{path}: must not be empty, got {_short(got)}"
        case "int_parsing" | "int_from_float" | "int_type":
            return f"{path}: must be a whole number, got {_short(got)}"
        case "float_parsing" | "float_type":
            return f"{path}: must be a number, got {_short(got)}"
    rule = problem["msg"].removeprefix("Input ").replace("should", "must")
    return f"{path}: {rule[0].lower()}{rule[1:]}, got {_short(got)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_beside(keys: Sequence[str]) -> list[str]:
    """Return the keys that exist where an unknown one was written."""
    if len(keys) > 2 and keys[-2] == "weight":
        return list(LbwConfig.model_fields)
    if "overrides" in keys[:-1]:
        return list(OverrideConfig.model_fields)
    section: Any = Config
    for key in keys[:-1]:
        section = section.model_fields[key].annotation
    return list(section.model_fields)
