"""Detectors by name, and one built with its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from torch import nn

from lbdet.errors import UserError, closest
from lbdet.models import detectors
from lbdet.models.adapt import adapt_predictors, infer_classes, predictors
from lbdet.models.ssd_tiny import ssd_tiny
from lbdet.models.weights import Weights, check_fit, float_part, load_into, load_weights

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "ssdlite320_mobilenet_v3_large": detectors.ssdlite320_mobilenet_v3_large,
    "ssd300_vgg16": detectors.ssd300_vgg16,
    "ssd_tiny": ssd_tiny,
    "fasterrcnn_resnet18_fpn": detectors.fasterrcnn_resnet18_fpn,
    "fasterrcnn_resnet50_fpn": detectors.fasterrcnn_resnet50_fpn,
    "fasterrcnn_mobilenet_v3_large_320_fpn": detectors.fasterrcnn_mobilenet_v3_large_320_fpn,
}
"""Name -> builder of an untrained detector from the number of classes, background included."""

log = logging.getLogger(__name__)


def build_detector(
    name: str,
    classes: Sequence[str],
    weights: str | None = None,
    weights_backbone: str | None = None,
    *,
    weights_classes: Sequence[str] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Build a detector for `classes`, on the CPU, and load its weights or its backbone's.

    Predictors of weights for other classes are adapted by class name; how many were kept is logged. Weights
    by torchvision's name compute what torchvision's model does, though its Faster R-CNN has frozen batch
    norm.

    Args:
        name: one of `MODELS`.
        classes: without background; label i is `classes[i - 1]`.
        weights: a file, or one of torchvision's names such as "COCO_V1".
        weights_backbone: the same for the classifier that the backbone comes from, such as "IMAGENET1K_V1".
        weights_classes: what the weights' predictors score, in order; None = as the file or its shapes tell.
        image_size: short side of the input in pixels (Faster R-CNN only); None = the architecture's own.

    Raises:
        UserError: an unknown name, unusable weights, or both kinds of weights.
    """
    if name not in MODELS:
        raise UserError(
            f"model name: must be one of {', '.join(MODELS)}, got {name!r}{closest(name, MODELS)}"
        )
    if weights is not None and weights_backbone is not None:
        raise UserError("weights_backbone: is part of weights, got both; leave one of them out")
    model = MODELS[name](len(classes) + 1)
    if image_size is not None:
        detectors.set_image_size(model, image_size)
    if weights is not None:
        _load_detector(model, name, float_part(load_weights(weights, name)), classes, weights_classes)
    if weights_backbone is not None:
        _load_backbone(model, name, weights_backbone)
    return model


def _load_detector(
    model: nn.Module, name: str, weights: Weights, classes: Sequence[str], from_classes: Sequence[str] | None
) -> None:
    architecture = weights.metadata.get("architecture", name)
    if architecture != name:
        raise UserError(f"{weights.source}: weights must be of {name}, got {architecture}; choose that model")
    check_fit(model, weights, any_rows=predictors(model))
    tensors = weights.tensors
    if Path(weights.source).name == detectors.EPS_ZERO_FILE:
        tensors = detectors.absorb_zero_eps(tensors)
    from_classes = from_classes or weights.classes or infer_classes(tensors, model, classes, weights.source)
    tensors, adaptation = adapt_predictors(tensors, model, from_classes, classes)
    load_into(model, replace(weights, tensors=tensors))
    log.info("%s: %s", weights.source, adaptation)


def _load_backbone(model: nn.Module, name: str, source: str) -> None:
    if name not in detectors.BACKBONES:
        raise UserError(
            f"weights_backbone: model must be one of {', '.join(detectors.BACKBONES)}, got {name}, "
            "whose backbone no classifier of torchvision's fits; give weights of a whole detector"
        )
    backbone = detectors.BACKBONES[name]
    weights = load_weights(source, backbone.classifier)
    with torch.device("meta"):  # its keys are wanted, not its memory
        classifier = torchvision.models.get_model(backbone.classifier, weights=None)
    keys = {new for key in classifier.state_dict() if (new := backbone.key(key))}
    tensors = {new: tensor for key, tensor in weights.tensors.items() if (new := backbone.key(key))}
    load_into(model, replace(weights, tensors=tensors), keys)
