"""The schema of a config.

A config is complete and stands alone: no inheritance between files, no interpolation. Paths are relative to
the current directory. Only this package and the few parts that build and run from a config know it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from lbdet.config.quantizer import (
    ActivationSection,
    QuantizerConfig,
    WeightSection,
    activation_format,
    weight_format,
)  # fmt: skip
from lbdet.config.schedule import ScheduleConfig
from lbdet.config.section import Section
from lbdet.convert import check_width
from lbdet.errors import UserError
from lbdet.precision import Precision


def _name_or_names(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"must be a name, a file or a list of names, got {value!r:.60}")


ClassNames = Annotated[str | list[str], BeforeValidator(_name_or_names)]
"""a name (voc20, coco80), a list, or a file with one a line"""


class ModelConfig(Section):
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


class DataConfig(Section):
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


class GuidanceConfig(Section):
    """What else pulls on the model: a float teacher, frozen or trained jointly.

    Each term has a weight, 0 = off.
    """

    name: Literal["teacher", "joint"] = "teacher"
    teacher: str = "float"
    """a float run's folder, a weights file, or "float": a copy of the model before training"""
    logits: float = Field(default=0.0, ge=0)
    boxes: float = Field(default=0.0, ge=0)
    features: float = Field(default=0.0, ge=0)
    """on the maps of `taps`"""
    taps: list[str] = Field(default=[])
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


class TrainConfig(Section):
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
    lr_milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.67, 0.89])
    """shares of the curve's steps at which `lr_curve: steps` divides the rate by 10"""
    clip_norm: float | None = Field(default=None, gt=0)
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """null = at the end of each epoch"""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """decay of the averaged weights that are evaluated and saved; null = no average"""
    amp: bool = False
    sync_bn: bool = False
    """batch statistics over all processes, where there are several on GPUs"""
    workers: int = Field(default=1, ge=0)
    freeze_bn_after: float | None = Field(default=None, ge=0, lt=1)
    """share of all steps after which batch norm keeps its statistics; null = as model.batch_norm says"""
    calibration_images: int = Field(default=64, ge=1)
    """training images that the ranges of activations are set on, where a phase begins"""
    correct_bn: int = Field(default=0, ge=0)
    """training images on which batch norm is adapted to the error of the weights before training; 0 = not"""
    recalibrate_bn: int = Field(default=0, ge=0)
    """training images that batch norm statistics are measured again on after training"""


class EvalConfig(Section):
    """The evaluation at the end of a run, and on the way."""

    max_images: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    every_epochs: int | None = Field(default=None, ge=1)
    """also while training, on 200 images; null = never"""


class Config(Section):
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
