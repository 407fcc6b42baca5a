"""The section `quantizer`: how numbers are represented."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from lbdet.config.section import PrecisionText, Section
from lbdet.convert import ActivationFormat, WeightFormat

Granularity = Literal["per_tensor", "per_channel"]


def _clip(value: object) -> object:
    if value == "learned" or (isinstance(value, float | int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"must be positive or 'learned', got {value!r:.60}")


Clip = Annotated[float | str, BeforeValidator(_clip)]


class LbwConfig(Section):
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


class UniformWeightConfig(Section):
    """Equally spaced values."""

    format: Literal["uniform"]
    granularity: Granularity = "per_channel"
    scale: Literal["learned", "max"] = "learned"
    symmetric: bool = True


class DorefaWeightConfig(Section):
    """Equally spaced values of tanh(w)."""

    format: Literal["dorefa"]


class BinaryWeightConfig(Section):
    """The sign and a mean magnitude."""

    format: Literal["binary"]
    granularity: Granularity = "per_channel"


class LearnedLevelsConfig(Section):
    """Values that are trained."""

    format: Literal["learned_levels"]
    granularity: Granularity = "per_tensor"
    symmetric: bool = False


class UniformActivationConfig(Section):
    """Equally spaced values with an exact zero."""

    format: Literal["uniform"]
    objective: Literal["mse", "channel_aware"] = "mse"
    """what a range minimises"""
    update: Literal["learned", "average", "loss", "fixed"] = "learned"
    """how a range goes on after calibration"""


class DorefaActivationConfig(Section):
    """Equally spaced values between 0 and a clip."""

    format: Literal["dorefa"]
    clip: Clip = 1.0


class BinaryActivationConfig(Section):
    """The sign."""

    format: Literal["binary"]


WeightSection = (
    LbwConfig | UniformWeightConfig | DorefaWeightConfig | BinaryWeightConfig | LearnedLevelsConfig
)
ActivationSection = UniformActivationConfig | DorefaActivationConfig | BinaryActivationConfig
WeightConfig = Annotated[WeightSection, Field(discriminator="format")]
ActivationConfig = Annotated[ActivationSection, Field(discriminator="format")]
WEIGHTS = {get_args(s.model_fields["format"].annotation)[0]: s for s in get_args(WeightSection)}
ACTIVATIONS = {get_args(s.model_fields["format"].annotation)[0]: s for s in get_args(ActivationSection)}
"""section by format"""


def weight_format(config: WeightSection) -> WeightFormat:
    """Return the number format that a config section describes."""
    return WeightFormat(config.format, config.model_dump(exclude={"format"}, exclude_none=True))


def activation_format(config: ActivationSection) -> ActivationFormat:
    """Return the number format that a config section describes."""
    return ActivationFormat(config.format, config.model_dump(exclude={"format"}, exclude_none=True))


class OverrideConfig(Section):
    """What the layers of one pattern have instead."""

    precision: PrecisionText | None = None
    weight: WeightConfig | None = None
    activation: ActivationConfig | None = None


class QuantizerConfig(Section):
    """How numbers are represented; how many bits they have stands in the schedule."""

    weight: WeightConfig = LbwConfig(format="lbw")
    activation: ActivationConfig = UniformActivationConfig(format="uniform")
    """of layer inputs, where the schedule gives act bits"""
    overrides: dict[str, OverrideConfig] = Field(default={})
    keep_float: list[str] = Field(default=[])
