"""The schema of a config.

A config is complete and stands alone: no inheritance between files, no interpolation. Paths are relative to
the current directory. Only this package, `build.py` and `cli/` know it.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lbdet.convert import ActivationFormat, WeightFormat, check_width
from lbdet.errors import UserError
from lbdet.precision import Precision
from lbdet.schedules import Constant, Cyclic, Progressive, Schedule, Stochastic, TwoStage

Granularity = Literal["per_tensor", "per_channel"]


def _parse_precision(value: object) -> object:
    if isinstance(value, Precision):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be 'float' or like W4, got {value!r:.60}")
    try:
        return Precision.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def _name_or_names(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"must be a name, a file or a list of names, got {value!r:.60}")


def _constant_unless_named(value: object) -> object:
    return {"name": "constant"} | value if isinstance(value, dict) else value


def _clip(value: object) -> object:
    if value == "learned" or (isinstance(value, float | int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"must be positive or 'learned', got {value!r:.60}")


Clip = Annotated[float | str, BeforeValidator(_clip)]
PrecisionText = Annotated[Precision, BeforeValidator(_parse_precision)]
ClassNames = Annotated[str | list[str], BeforeValidator(_name_or_names)]
"""a name (voc20, coco80), a list, or a file with one a line"""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which detector or classifier, and what it starts from."""

    name: str
    weights: str | None = None
    """a .safetensors or .pth file, or torchvision's own by name, such as COCO_V1"""
    weights_backbone: str | None = None
    """a classifier's weights for the backbone alone"""
    weights_classes: ClassNames | None = None
    """the classes of the predictors in `weights`, where the file does not say"""
    batch_norm: Literal["train", "frozen"] = "train"
    image_size: int | None = Field(default=None, ge=32)
    """pixels: short side of Faster R-CNN's input, side of a classifier's; SSDs have a fixed one"""


class DataConfig(_Section):
    """Which images and classes; what `train` and `val` mean depends on `name`, see datasets/README.md."""

    name: str
    root: str
    train: list[str] = Field(min_length=1)
    val: list[str] = Field(min_length=1)
    classes: ClassNames | None = None
    """null = those of the data set, which only sets for classification have"""
    other_classes: Literal["error", "ignore"] = "error"
    score_classes: list[str] | None = Field(default=None, min_length=1)
    """the classes that the mean AP is over; null = all"""
    augment: str = "flip"
    """none, flip, ssd, ssdlite, multiscale, cifar, imagenet, or an albumentations YAML"""


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


class UniformWeightConfig(_Section):
    """Equally spaced values."""

    format: Literal["uniform"]
    granularity: Granularity = "per_channel"
    scale: Literal["learned", "max"] = "learned"
    symmetric: bool = True


class DorefaWeightConfig(_Section):
    """Equally spaced values of tanh(w)."""

    format: Literal["dorefa"]


class BinaryWeightConfig(_Section):
    """The sign and a mean magnitude."""

    format: Literal["binary"]
    granularity: Granularity = "per_channel"


class LearnedLevelsConfig(_Section):
    """Values that are trained."""

    format: Literal["learned_levels"]
    granularity: Granularity = "per_tensor"
    symmetric: bool = False


class UniformActivationConfig(_Section):
    """Equally spaced values with an exact zero."""

    format: Literal["uniform"]
    objective: Literal["mse", "channel_aware"] = "mse"
    """what a range minimises"""
    update: Literal["learned", "average", "loss", "fixed"] = "learned"
    """how a range goes on after calibration"""


class DorefaActivationConfig(_Section):
    """Equally spaced values between 0 and a clip."""

    format: Literal["dorefa"]
    clip: Clip = 1.0


class BinaryActivationConfig(_Section):
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


class OverrideConfig(_Section):
    """What the layers of one pattern have instead."""

    precision: PrecisionText | None = None
    weight: WeightConfig | None = None
    activation: ActivationConfig | None = None


class QuantizerConfig(_Section):
    """How numbers are represented; how many bits they have stands in the schedule."""

    weight: WeightConfig = LbwConfig(format="lbw")
    activation: ActivationConfig = UniformActivationConfig(format="uniform")
    """of layer inputs, where the schedule gives act bits"""
    overrides: dict[str, OverrideConfig] = {}
    keep_float: list[str] = []


class StochasticConfig(_Section):
    """A random share of blocks is quantized at each step, the rest is float; the share rises to 1."""

    first: float = Field(default=0.5, ge=0, le=1)
    """the share at step 0"""
    until: float = Field(default=0.8, gt=0, le=1)
    """share of all updates after which every block is quantized"""
    blocks: list[str] = []
    """patterns of module names; empty = found from the module tree"""


class PhaseChangeConfig(_Section):
    """What happens where a schedule goes on to another width."""

    ranges: Literal["calibrate", "rescale"] = "calibrate"
    """of activations whose width changes: measured on training images, or the clip before at the new width"""
    reset_momentum: bool = False
    """forget the optimizer's averages"""
    restart_lr: bool = True
    """begin the learning-rate curve, its warm-up too, again for each phase"""


class _ScheduleSection(_Section):
    """How precise each layer is at each step. Every schedule has these keys."""

    target: PrecisionText
    stochastic: StochasticConfig | None = None
    phase_change: PhaseChangeConfig = PhaseChangeConfig()

    def build(self, seed: int = 0) -> Schedule:
        """Make the schedule; `seed` is that of the draws of stochastic precision."""
        if self.stochastic is None:
            return self.plain()
        return Stochastic(self.plain(), self.stochastic.first, self.stochastic.until, seed)

    def plain(self) -> Schedule:
        """Make the schedule without stochastic precision; its ValueErrors are the config's."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _makes_a_schedule(self) -> _ScheduleSection:
        self.plain()
        return self


class ConstantConfig(_ScheduleSection):
    """The target from the first step to the last."""

    name: Literal["constant"]

    def plain(self) -> Constant:
        return Constant(self.target)


class TwoStageConfig(_ScheduleSection):
    """Weights first, then activations too."""

    name: Literal["two_stage"]
    share: float = Field(default=0.5, gt=0, lt=1)
    """of the updates, for the weights alone"""

    def plain(self) -> TwoStage:
        return TwoStage(self.target, self.share)


class ProgressiveConfig(_ScheduleSection):
    """One width after the other."""

    name: Literal["progressive"]
    through: list[PrecisionText] = Field(min_length=1)
    """the widths before the target"""
    shares: list[float] | None = None
    """of the updates: one a width, the target's too; null = equal"""
    two_stage: bool = False
    """whether each width begins with the weights alone"""

    def plain(self) -> Progressive:
        shares = None if self.shares is None else tuple(self.shares)
        return Progressive((*self.through, self.target), shares, self.two_stage)


class CyclicConfig(_ScheduleSection):
    """Down from `start` to the target by a bit a stage, several times."""

    name: Literal["cyclic"]
    start: PrecisionText
    cycles: int = Field(default=2, ge=1)

    def plain(self) -> Cyclic:
        return Cyclic(self.start, self.target, self.cycles)


ScheduleSection = ConstantConfig | TwoStageConfig | ProgressiveConfig | CyclicConfig
ScheduleConfig = Annotated[
    ScheduleSection, Field(discriminator="name"), BeforeValidator(_constant_unless_named)
]
SCHEDULES = {get_args(s.model_fields["name"].annotation)[0]: s for s in get_args(ScheduleSection)}
"""section by name"""


class GuidanceConfig(_Section):
    """What else pulls on the model: a float teacher, frozen or trained jointly.

    Each term has a weight, 0 = off.
    """

    name: Literal["teacher", "joint"] = "teacher"
    teacher: str = "float"
    """a run's folder, a weights file, or "float": a copy of the model before training"""
    logits: float = Field(default=0.0, ge=0)
    boxes: float = Field(default=0.0, ge=0)
    features: float = Field(default=0.0, ge=0)
    """on the maps of `taps`"""
    taps: list[str] = []
    """names of modules, such as backbone"""
    tap_bits: int | None = Field(default=None, ge=2, le=8)
    """width to which the teacher's maps are rounded first; null = as they are"""
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _some_term_is_on(self) -> GuidanceConfig:
        if not self.logits and not self.boxes and not self.features:
            raise ValueError("a term must have a weight, got none; give logits: 1, boxes: 1 or features: 1")
        if bool(self.features) != bool(self.taps):
            raise ValueError(
                f"features and taps belong together, got features {self.features} and taps {self.taps}"
            )
        return self


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
    calibration_images: int = Field(default=64, ge=1)
    """training images that the ranges of activations are set on, where a phase begins"""
    correct_bn: int = Field(default=0, ge=0)
    """training images on which batch norm is adapted to the error of the weights before training; 0 = not"""
    recalibrate_bn: int = Field(default=0, ge=0)
    """training images that batch norm statistics are measured again on after training"""


class EvalConfig(_Section):
    """The evaluation at the end of a run, and on the way."""

    max_images: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    every_epochs: int | None = Field(default=None, ge=1)
    """also while training, on 200 images; null = never"""


class Config(_Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    quantizer: QuantizerConfig = QuantizerConfig()
    schedule: ScheduleConfig
    guidance: GuidanceConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _formats_can_do_the_widths(self) -> Config:
        quantizer = self.quantizer
        try:
            scheduled = self.schedule.build().precisions()
            for wanted in scheduled:
                where = "schedule.target" if wanted == self.schedule.target else "schedule"
                self._check(quantizer.weight, quantizer.activation, wanted, where)
            for pattern, override in quantizer.overrides.items():
                weight = override.weight or quantizer.weight
                activation = override.activation or quantizer.activation
                for wanted in (override.precision,) if override.precision else scheduled:
                    self._check(weight, activation, wanted, f"quantizer.overrides.{pattern}")
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    @staticmethod
    def _check(
        weight: WeightSection, activation: ActivationSection, precision: Precision, where: str
    ) -> None:
        check_width(weight_format(weight).build(), activation_format(activation).build(), precision, where)
