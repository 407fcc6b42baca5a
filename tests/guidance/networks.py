"""Small networks, a batch for each, and the losses of their tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from lbdet.engine.task import ClassificationTask, DetectionTask
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS
from lbdet.models.detectors import set_image_size

SSD, SSDLITE, RCNN, RESNET = (
    "ssd_tiny", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "resnet20_cifar",
)  # fmt: skip
NETWORKS = (SSD, SSDLITE, RCNN, RESNET)
TAPS = {SSD: ("backbone", "head"), SSDLITE: ("backbone",), RCNN: ("backbone", "roi_heads.box_head"),
        RESNET: ("layer1.2", "layer3")}  # fmt: skip
"""Some modules of each that put maps out: a dict of them, tensors, and one that runs on proposals."""


def build(name: str, seed: int = 0) -> Any:
    """Return a network in training mode; Faster R-CNN is on 64 pixels and small behind."""
    return copy.deepcopy(_built(name, seed))


@cache
def _built(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name in CLASSIFIERS:
        return CLASSIFIERS[name](3)
    model: Any = MODELS[name](4)
    if name == RCNN:
        set_image_size(model, 64)
        model.roi_heads.box_head = TwoMLPHead(256 * 7 * 7, 64)
        model.roi_heads.box_predictor = FastRCNNPredictor(64, 4)
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    return model


def losses_of(
    name: str, sizes: tuple[int, int] = (64, 48), objects: int = 2
) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return the task's losses on a batch of two images: one with some objects, and one without."""
    generator = torch.Generator().manual_seed(1)
    if name in CLASSIFIERS:
        images = [torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=generator) for _ in range(4)]
        labels = [{"label": torch.tensor(i % 3)} for i in range(4)]
        return lambda model: ClassificationTask().losses(model, images, labels)
    images = [torch.randint(256, (3, s, 64), dtype=torch.uint8, generator=generator) for s in sizes]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 46.0], [30.0, 20.0, 60.0, 47.0]])
    targets = [
        {"boxes": boxes[:objects], "labels": torch.tensor([1, 3])[:objects]},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return lambda model: DetectionTask().losses(model, images, targets)


def total(losses: dict[str, Tensor]) -> Tensor:
    """Return their sum."""
    return torch.stack(list(losses.values())).sum()


def hooks(model: nn.Module) -> int:
    """Count the hooks that watch a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
