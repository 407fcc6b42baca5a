"""What differs between detection and classification, for the loop and the evaluation that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.convert import hold_weights
from lbdet.data.labelled import LabelledData, LabelledEvalSet, stack_images
from lbdet.data.loader import Target, eval_batches
from lbdet.data.records import DetectionData
from lbdet.engine import distributed
from lbdet.engine.detection_losses import detection_losses
from lbdet.engine.evaluate import evaluate, image_batches, to_model
from lbdet.engine.progress import track
from lbdet.metrics.coco import to_coco_results
from lbdet.metrics.topk import top_k

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""of ImageNet's photographs in [0, 1]; torchvision's detectors do this themselves"""


class Task(Protocol):
    """What the training loop and the evaluation ask for; `data` is always of the task's own kind."""

    headline: ClassVar[tuple[tuple[str, str], ...]]
    """(name, key of the metrics) of the numbers that are shown, the most important first"""

    def losses(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Return the named losses `[]` of a batch; images are uint8 `[3, H, W]`."""
        ...

    def inputs(self, data: Any, batch_size: int, device: torch.device) -> Iterator[list[Tensor] | Tensor]:
        """Yield the images of a data set in order, as the model takes them in eval mode."""
        ...

    def evaluate(self, model: nn.Module, data: Any, batch_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the metrics of metrics.json, and the content of further JSON files by name."""
        ...


@dataclass(frozen=True)
class DetectionTask:
    """Boxes; torchvision's detectors compute their own losses."""

    score_classes: Sequence[str] | None = None
    """the classes that the means are over; None = all"""
    headline: ClassVar[tuple[tuple[str, str], ...]] = (
        ("VOC 11-point mAP", "voc07_map"),
        ("VOC area mAP", "voc_area_map"),
        ("COCO mAP", "coco_map"),
    )

    def losses(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        with hold_weights(model):  # heads that several feature maps share use their weights several times
            return detection_losses(model, to_model(images, _device(model)), targets)

    def inputs(self, data: DetectionData, batch_size: int, device: torch.device) -> Iterator[list[Tensor]]:
        return image_batches(data, batch_size, 1, device)

    def evaluate(
        self, model: nn.Module, data: DetectionData, batch_size: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        result = evaluate(model, data, self.score_classes, batch_size)
        found = to_coco_results(result.detections, [record.id for record in data.records])
        return result.metrics, {"detections.json": found}


@dataclass(frozen=True)
class ClassificationTask:
    """One label an image; cross entropy."""

    image_size: int | None = None
    """evaluation crops to this many pixels; None = images as they are"""
    headline: ClassVar[tuple[tuple[str, str], ...]] = (("top-1", "top1"), ("top-5", "top5"))

    def losses(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        labels = torch.stack([target["label"] for target in targets])
        return {"classification": F.cross_entropy(model(normalized(images, _device(model))), labels)}

    def inputs(self, data: LabelledData, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        for images, _ in eval_batches(LabelledEvalSet(data, self.image_size), batch_size, 1):
            yield normalized(images, device)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, data: LabelledData, batch_size: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        model.eval()
        mine = distributed.own_batches(data, batch_size)
        batches = -(-len(mine) // batch_size)
        inputs = track(self.inputs(mine, batch_size, _device(model)), batches, "evaluate")
        with hold_weights(model):
            parts = distributed.gather([model(images).float().cpu() for images in inputs])
        logits = torch.cat(list(chain(*parts)))
        return top_k(logits, data.labels) | {"images": len(data)}, {}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def normalized(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return uint8 images `[3, H, W]` of one size as the float batch that classifiers take."""
    batch = stack_images(images).to(device, non_blocking=True).float().div_(255)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return batch.sub_(mean).div_(std)
