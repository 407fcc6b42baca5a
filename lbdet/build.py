"""From a config to objects.

What can be wrong with a config is found here, before anything is written or trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection.ssd import SSD

from lbdet.classes import CLASS_LISTS
from lbdet.config import Config, DataConfig, ScheduleConfig, load_config, weight_format
from lbdet.convert import LayerCoverage, Override, quantize_model, scheduled_layers, set_precision
from lbdet.data import DATASETS
from lbdet.data.augment import build_augmentation
from lbdet.data.coco import read_coco
from lbdet.data.loader import TrainSet
from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES, render_shapes
from lbdet.data.voc import download_voc, read_voc
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.train import TrainSettings
from lbdet.errors import UserError, closest
from lbdet.models import build_detector
from lbdet.models.weights import load_into, load_weights
from lbdet.schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class Built:
    """A detector ready to train or evaluate, as a config or a run describes it."""

    config: Config
    model: nn.Module
    coverage: list[LayerCoverage]
    classes: tuple[str, ...]


def device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_classes(value: str | Sequence[str], where: str) -> tuple[str, ...]:
    """Return the classes that a config names: a list, a list's name, or a file with one a line.

    Raises:
        UserError: neither, or a class that stands twice, or none.
    """
    lists = CLASS_LISTS | {"shapes": SHAPE_CLASSES}
    if not isinstance(value, str):
        names = tuple(value)
    elif value in lists:
        names = lists[value]
    elif Path(value).is_file():
        names = _lines(value)
    else:
        raise UserError(
            f"{where}: must be a list, a file or one of {', '.join(lists)}, "
            f"got {value!r}{closest(value, lists)}"
        )
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice or not names:
        got = f"{twice[0]!r} twice" if twice else "none"
        raise UserError(f"{where}: must be different names, at least one, got {got}")
    return names


def _lines(path: str) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: must be a text file with a class name a line, got {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def read_data(config: DataConfig, splits: Sequence[str]) -> DetectionData:
    """Read some splits of a config's data set.

    Raises:
        UserError: an unknown data set, or whatever is wrong with its files.
    """
    if config.name not in DATASETS:
        raise UserError(
            f"data.name: must be one of {', '.join(DATASETS)}, "
            f"got {config.name!r}{closest(config.name, DATASETS)}"
        )
    classes = named_classes(config.classes, "data.classes")
    for name in config.score_classes or ():
        if name not in classes:
            raise UserError(
                f"data.score_classes: {name!r} is none of the {len(classes)} classes{closest(name, classes)}"
            )
    if config.name == "coco":
        if len(splits) != 1 or ":" not in splits[0]:
            raise UserError(f"data: a coco split is one images_folder:annotations.json, got {list(splits)}")
        images, annotations = splits[0].split(":", 1)
        return read_coco(
            Path(config.root, images), Path(config.root, annotations), classes, config.other_classes
        )
    if config.name == "shapes":
        render_shapes(config.root)
    return read_voc(config.root, splits, classes, config.other_classes)


def download(config: DataConfig) -> None:
    """Fetch the years of PASCAL VOC that a config's splits name into `data.root`, MD5 checked.

    Raises:
        UserError: another data set, splits without a year, or a failing network.
    """
    years = {split.partition(":")[0] for split in (*config.train, *config.val) if ":" in split}
    if config.name != "voc" or not years:
        raise UserError(
            f"--download: is for PASCAL VOC's year:split, got data {config.name!r}, {config.train}"
        )
    for year in sorted(years):
        download_voc(config.root, year)


def build_train_set(config: Config) -> TrainSet:
    """Read the training split and its augmentation.

    Raises:
        UserError: as `read_data`; no image; an unusable augmentation.
    """
    data = read_data(config.data, config.data.train)
    if not data.records:
        raise UserError(f"data.train: must hold images, got none in {config.data.train}")
    return TrainSet(data, build_augmentation(config.data.augment), config.seed)


def check_batch_norm(config: Config, model: nn.Module) -> None:
    """Refuse to train batch norm of an SSD on single images: its deepest maps are 1x1 and have no variance.

    Raises:
        UserError: `train.batch_size` is 1, the detector an SSD and its batch norm not frozen.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if (
        layers
        and isinstance(model, SSD)
        and config.train.batch_size == 1
        and config.model.batch_norm == "train"
    ):
        raise UserError(
            "train.batch_size: must be at least 2 for an SSD with model.batch_norm: train, got 1; "
            "use more images, or model.batch_norm: frozen"
        )


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Make the schedule of a config."""
    return SCHEDULES[config.name](config.target)


def build(config: Config) -> Built:
    """Build the float detector with its weights, quantize it and put it on the device, at its last precision.

    The weights that no file gives are random by the config's seed.
    """
    classes = named_classes(config.data.classes, "data.classes")
    from_classes = config.model.weights_classes
    torch.manual_seed(config.seed)
    model = build_detector(
        config.model.name,
        classes,
        config.model.weights,
        config.model.weights_backbone,
        weights_classes=named_classes(from_classes, "model.weights_classes") if from_classes else None,
        image_size=config.model.image_size,
    )
    return _quantized(config, model, classes)


def load_run(path: str | Path) -> Built:
    """Build the detector that a run left.

    Raises:
        UserError: no run, an unfinished one, or weights of another model.
    """
    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise UserError(
            f"{path}: must be the folder of a run, got no config.yaml in it; see tools/train_det.py"
        )
    if not run.model.is_file():
        raise UserError(f"{path}: has no model.safetensors yet; finish it with tools/train_det.py --resume")
    config = load_config(run.config)
    weights = load_weights(str(run.model))
    if weights.classes is None:
        raise UserError(
            f"{run.model}: must name its classes as a run's model does, got none; train the run again"
        )
    model = build_detector(config.model.name, weights.classes, image_size=config.model.image_size)
    built = _quantized(config, model, weights.classes)
    load_into(built.model, weights)
    return built


def build_settings(config: Config) -> TrainSettings:
    """Gather what the training loop is told."""
    return TrainSettings(
        **config.train.model_dump(exclude={"correct_bn", "recalibrate_bn"}),
        batch_norm=config.model.batch_norm,
        eval_every_epochs=config.eval.every_epochs,
    )


def _quantized(config: Config, model: nn.Module, classes: tuple[str, ...]) -> Built:
    schedule = build_schedule(config.schedule)
    overrides = [
        Override(pattern, o.precision, weight_format(o.weight) if o.weight else None)
        for pattern, o in config.quantizer.overrides.items()
    ]
    weight, target = weight_format(config.quantizer.weight), config.schedule.target
    try:
        model, coverage = quantize_model(model, target, weight, overrides, config.quantizer.keep_float)
    except UserError as error:
        raise UserError(f"quantizer: {error}") from None
    set_precision(model, schedule.plan(0, 1, scheduled_layers(model), {}).precision)
    return Built(config, model.to(device()), coverage, classes)
