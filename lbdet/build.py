"""From a config to objects.

What can be wrong with a config is found here, before anything is written or trained.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection.ssd import SSD

from lbdet.classes import CLASS_LISTS
from lbdet.config import Config, DataConfig, activation_format, load_config, weight_format
from lbdet.convert import (
    LayerCoverage,
    Override,
    find_blocks,
    quantize_model,
    set_float,
    set_scheduled_precision,
)
from lbdet.data import DATASETS, LABELLED_DATASETS
from lbdet.data.augment import build_augmentation
from lbdet.data.classification import CIFAR, read_cifar
from lbdet.data.coco import read_coco
from lbdet.data.files import read_text, reason
from lbdet.data.labelled import LabelledData, LabelledTrainSet
from lbdet.data.loader import TrainSet
from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES, render_shapes
from lbdet.data.voc import download_voc, read_voc
from lbdet.engine import distributed
from lbdet.engine.phases import PhaseChange
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.settings import TrainSettings
from lbdet.engine.task import ClassificationTask, DetectionTask, Task
from lbdet.errors import UserError, closest, short
from lbdet.guidance import GUIDANCE, Guidance
from lbdet.models import MODELS, build_detector
from lbdet.models.classifiers import CLASSIFIERS, build_classifier
from lbdet.models.weights import load_into, load_weights

_MAX_CLASSES = 1 << 20  # bytes of a file of class names; 22 thousand of ImageNet take 400 KiB
_MAX_NAME = 200  # characters of one of them


@dataclass(frozen=True)
class Built:
    """A detector or classifier ready to train or evaluate, as a config or a run describes it."""

    config: Config
    model: nn.Module
    coverage: list[LayerCoverage]
    classes: tuple[str, ...]


def device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _on_device(model: nn.Module) -> nn.Module:
    """Move a model to the device; channels last is 1.5 times as fast in training, on a CPU too."""
    return model.to(device()).to(memory_format=torch.channels_last)


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
    elif os.path.isfile(value):  # Path's raises where the text is too long for a name
        names = _lines(value)
    else:
        raise UserError(
            f"{where}: must be a list, a file or one of {', '.join(lists)}, "
            f"got {short(value)}{closest(value, lists)}"
        )
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None or not names:
        got = f"{short(twice)} twice" if names else "none"
        raise UserError(f"{where}: must be different names, at least one, got {got}")
    return names


def _lines(path: str) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in read_text(path, _MAX_CLASSES).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: must be a text file with a class name a line, got {reason(error)}"
        ) from None
    for number, line in enumerate(lines, 1):
        if len(line) > _MAX_NAME:
            raise UserError(
                f"{path}: line {number}: must be a class name of at most {_MAX_NAME} characters, "
                f"got {len(line)}"
            )
    return tuple(filter(None, lines))


def read_data(config: DataConfig, splits: Sequence[str]) -> DetectionData | LabelledData:
    """Read some splits of a config's data set.

    Raises:
        UserError: an unknown data set, or whatever is wrong with its files.
    """
    if config.name in LABELLED_DATASETS:
        return _read_labelled(config, splits)
    if config.name not in DATASETS:
        names = [*DATASETS, *LABELLED_DATASETS]
        raise UserError(
            f"data.name: must be one of {', '.join(names)}, got {config.name!r}{closest(config.name, names)}"
        )
    if config.classes is None:
        raise UserError(f"data.classes: must be given for {config.name!r}, got null; voc20, coco80 or a list")
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


def _read_labelled(config: DataConfig, splits: Sequence[str]) -> LabelledData:
    if len(splits) != 1:
        raise UserError(f"data: {config.name!r} reads one split at a time, got {list(splits)}; name one")
    if config.score_classes is not None:
        raise UserError(f"data.score_classes: is for detection, got it with {config.name!r}; leave it out")
    classes = named_classes(config.classes, "data.classes") if config.classes else None
    data = LABELLED_DATASETS[config.name](config.root, splits[0], classes)
    if classes not in (None, data.classes):
        raise UserError(
            f"data.classes: must be those of the data set or null, got {config.classes!r:.40} for "
            f"{', '.join(data.classes):.40}"
        )
    return data


def download(config: DataConfig) -> None:
    """Fetch a data set into `data.root`, MD5 checked: CIFAR, or the years of PASCAL VOC that the splits name.

    Raises:
        UserError: another data set, VOC's splits without a year, or a failing network.
    """
    if config.name in CIFAR:
        read_cifar(config.root, config.name, "train", download=True)
        return
    years = {split.partition(":")[0] for split in (*config.train, *config.val) if ":" in split}
    if config.name != "voc" or not years:
        raise UserError(
            f"--download: is for CIFAR and PASCAL VOC's year:split, got data {config.name!r}, {config.train}"
        )
    for year in sorted(years):
        download_voc(config.root, year)


def is_classification(config: Config) -> bool:
    """Return whether a config is for a classifier.

    Raises:
        UserError: an unknown model; a classifier with a data set for detection, or the other way round.
    """
    models, name = [*MODELS, *CLASSIFIERS], config.model.name
    if name not in models:
        raise UserError(
            f"model.name: must be one of {', '.join(models)}, got {name!r}{closest(name, models)}"
        )
    classifier, labelled = name in CLASSIFIERS, config.data.name in LABELLED_DATASETS
    if classifier != labelled and config.data.name in (*DATASETS, *LABELLED_DATASETS):
        kind, names = ("classifier", LABELLED_DATASETS) if classifier else ("detector", DATASETS)
        raise UserError(
            f"data.name: a {kind} needs one of {', '.join(names)}, got {config.data.name!r} for {name!r}"
        )
    return classifier


def check_kind(config: Config, classification: bool) -> None:
    """Refuse a detector's config in a tool for classifiers, and the other way round.

    Raises:
        UserError: naming the other tool.
    """
    if is_classification(config) != classification:
        kind, other = ("detector", "*_det.py") if classification else ("classifier", "*_cls.py")
        raise UserError(f"model.name: {config.model.name!r} is a {kind}; use the tools {other}")


def build_task(config: Config) -> Task:
    """Return what the training loop needs to know of the kind of model."""
    if is_classification(config):
        return ClassificationTask(config.model.image_size)
    return DetectionTask(config.data.score_classes)


def build_train_set(config: Config) -> TrainSet | LabelledTrainSet:
    """Read the training split and its augmentation.

    Raises:
        UserError: as `read_data`; no image; an unusable augmentation.
    """
    data = read_data(config.data, config.data.train)
    if not len(data):
        raise UserError(f"data.train: must hold images, got none in {config.data.train}")
    if isinstance(data, LabelledData):
        size = config.model.image_size
        augmentation = build_augmentation(config.data.augment, *(() if size is None else (size,)))
        return LabelledTrainSet(data, augmentation, config.seed)
    return TrainSet(data, build_augmentation(config.data.augment), config.seed)


def check_processes(config: Config, images: int) -> None:
    """Refuse batches that several processes cannot share equally, and what they cannot do on a CPU.

    Args:
        images: to train on.

    Raises:
        UserError: naming the key.
    """
    processes, batch_size = distributed.world_size(), config.train.batch_size
    if batch_size % processes:
        raise UserError(
            f"train.batch_size: must be a multiple of the {processes} processes, which share each batch, "
            f"got {batch_size}; {processes * -(-batch_size // processes)} is one"
        )
    if min(batch_size, images) % processes:
        raise UserError(
            f"train.batch_size: must not exceed the {images} images where {processes} processes share "
            f"a batch, got {batch_size}"
        )
    if config.train.sync_bn and processes > 1 and device().type == "cpu":
        raise UserError(
            "train.sync_bn: must be false on CPUs, for which PyTorch has none, got true; "
            "leave it out, or use model.batch_norm: frozen"
        )


def check_batch_norm(config: Config, model: nn.Module) -> None:
    """Refuse to train batch norm of an SSD on single images: its deepest maps are 1x1 and have no variance.

    Raises:
        UserError: `train.batch_size` is 1 a process, the detector an SSD and its batch norm not frozen.
    """
    processes = distributed.world_size()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if (
        layers
        and isinstance(model, SSD)
        and config.train.batch_size == processes
        and config.model.batch_norm == "train"
    ):
        raise UserError(
            f"train.batch_size: must be at least {2 * processes} for an SSD with model.batch_norm: train, "
            f"got {processes}; use more images, or model.batch_norm: frozen"
        )


def build_blocks(config: Config, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Find the blocks of a converted model that the config's schedule needs.

    Raises:
        UserError: a pattern that matches nothing.
    """
    stochastic = config.schedule.stochastic
    return find_blocks(model, stochastic.blocks) if stochastic else {}


def build(config: Config, classes: Sequence[str] | None = None) -> Built:
    """Build the float model with its weights, quantize it and put it on the device, at its last precision.

    The weights that no file gives are random by the config's seed.

    Args:
        classes: those of the data set, where the config leaves them to it.
    """
    if config.data.classes is not None:
        classes = named_classes(config.data.classes, "data.classes")
    assert classes is not None
    torch.manual_seed(config.seed)
    model = _float_model(config, classes, config.model.weights, config.model.weights_backbone)
    if config.train.sync_bn and distributed.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _quantized(config, model, tuple(classes))


def load_run(path: str | Path) -> Built:
    """Build the model that a run left.

    Raises:
        UserError: no run, an unfinished one, or weights of another model.
    """
    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise UserError(
            f"{path}: must be the folder of a run, got no config.yaml in it; see tools/train_det.py"
        )
    config = load_config(run.config)
    if not run.model.is_file():
        tool = "train_cls.py" if is_classification(config) else "train_det.py"
        raise UserError(f"{path}: has no model.safetensors yet; finish it with tools/{tool} --resume")
    weights = load_weights(str(run.model))
    if weights.classes is None:
        raise UserError(
            f"{run.model}: must name its classes as a run's model does, got none; train the run again"
        )
    built = _quantized(config, _float_model(config, weights.classes, None, None), weights.classes)
    load_into(built.model, weights)
    return built


def _float_model(
    config: Config, classes: Sequence[str], weights: str | None, weights_backbone: str | None
) -> nn.Module:
    model = config.model
    named = model.weights_classes
    from_classes = named_classes(named, "model.weights_classes") if named else None
    if not is_classification(config):
        return build_detector(
            model.name, classes, weights, weights_backbone,
            weights_classes=from_classes, image_size=model.image_size,
        )  # fmt: skip
    if weights_backbone is not None:
        raise UserError(f"model.weights_backbone: is for detectors, got {weights_backbone!r}; use weights")
    return build_classifier(model.name, classes, weights, weights_classes=from_classes)


def build_guidance(config: Config, student: Built) -> Guidance | None:
    """Make the teacher of a config and let it watch the student, which must have its first weights still.

    Raises:
        UserError: a teacher that is no run or weights of the student's architecture and classes.
    """
    guidance = config.guidance
    if guidance is None:
        return None
    teacher = _teacher(config, guidance.teacher, student)
    settings = guidance.model_dump(exclude={"name", "teacher"})
    return GUIDANCE[guidance.name](student.model, teacher, **settings, divisor=distributed.divisor)


def _teacher(config: Config, source: str, student: Built) -> nn.Module:
    if source == "float":
        teacher = deepcopy(student.model)
    elif Path(source).is_dir():
        run = load_run(source)
        if (run.config.model.name, run.classes) != (config.model.name, student.classes):
            raise UserError(
                f"guidance.teacher: must be a {config.model.name} of the same classes, got {source} "
                f"with a {run.config.model.name} of {len(run.classes)}"
            )
        teacher = run.model
    else:
        teacher = _on_device(_float_model(config, student.classes, source, None))
    set_float(teacher)
    return teacher


def build_settings(config: Config) -> TrainSettings:
    """Gather what the training loop is told."""
    return TrainSettings(
        **config.train.model_dump(exclude={"correct_bn", "recalibrate_bn", "sync_bn"}),
        batch_norm=config.model.batch_norm,
        eval_every_epochs=config.eval.every_epochs,
        phase_change=PhaseChange(**config.schedule.phase_change.model_dump()),
    )


def _quantized(config: Config, model: nn.Module, classes: tuple[str, ...]) -> Built:
    overrides = [
        Override(
            pattern,
            o.precision,
            weight_format(o.weight) if o.weight else None,
            activation_format(o.activation) if o.activation else None,
        )
        for pattern, o in config.quantizer.overrides.items()
    ]
    quantizer = config.quantizer
    weight, activation = weight_format(quantizer.weight), activation_format(quantizer.activation)
    target = config.schedule.target
    try:
        model, coverage = quantize_model(model, target, weight, activation, overrides, quantizer.keep_float)
    except UserError as error:
        raise UserError(f"quantizer: {error}") from None
    for precision in config.schedule.build().precisions():
        set_scheduled_precision(model, precision)
    set_scheduled_precision(model, target)
    return Built(config, _on_device(model), coverage, classes)
