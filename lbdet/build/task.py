"""From a config to what is done with it: detection or classification, and how it is trained."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torchvision.models.detection.ssd import SSD

from lbdet.config import Config
from lbdet.data import DATASETS, LABELLED_DATASETS
from lbdet.engine import distributed
from lbdet.engine.phases import PhaseChange
from lbdet.engine.settings import TrainSettings
from lbdet.engine.task import ClassificationTask, DetectionTask, Task
from lbdet.errors import UserError, closest
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS


def device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_classification(config: Config, choices: Collection[str] = (*MODELS, *CLASSIFIERS)) -> bool:
    """Return whether a config is for a classifier.

    Args:
        choices: the models that are named where the config's is unknown.

    Raises:
        UserError: an unknown model; a classifier with a data set for detection, or the other way round.
    """
    name = config.model.name
    if name not in MODELS and name not in CLASSIFIERS:
        raise UserError(
            f"model.name: must be one of {', '.join(choices)}, got {name!r}{closest(name, choices)}"
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
    if is_classification(config, CLASSIFIERS if classification else MODELS) != classification:
        kind, other = ("detector", "*_det.py") if classification else ("classifier", "*_cls.py")
        raise UserError(f"model.name: {config.model.name!r} is a {kind}; use the tools {other}")


def build_task(config: Config) -> Task:
    """Return what the training loop needs to know of the kind of model."""
    if is_classification(config):
        return ClassificationTask(config.model.image_size)
    return DetectionTask(config.data.score_classes)


def build_settings(config: Config) -> TrainSettings:
    """Gather what the training loop is told."""
    return TrainSettings(
        **config.train.model_dump(exclude={"correct_bn", "recalibrate_bn", "sync_bn"}),
        batch_norm=config.model.batch_norm,
        eval_every_epochs=config.eval.every_epochs,
        phase_change=PhaseChange(**config.schedule.phase_change.model_dump()),
    )


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
