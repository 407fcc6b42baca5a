"""What do the losses of a detector divide by? The objects of the whole batch, whoever shares it.

torchvision's detectors divide by a count of their own images:

    model         losses                                        divided by
    SSD           bbox_regression, classification               anchors on an object, at least 1
    Faster R-CNN  loss_objectness, loss_rpn_box_reg             anchors that were sampled
                  loss_classifier, loss_box_reg                 proposals that were sampled

A process with few objects would weigh each of them more than the others do. So each multiplies its losses by
its own count and divides by the mean count of all: the mean of all ranks is what one process would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.ssd import SSD

from lbdet.data.loader import Target
from lbdet.engine import distributed


def detection_losses(model: nn.Module, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
    """Return the losses `[]` of a detector in training mode, by name; their means over ranks are the batch's.

    Args:
        images: float32 `[3, H, W]` in [0, 1], on the model's device, as the targets are.
    """
    if distributed.world_size() == 1:
        return model(images, targets)
    counts = _counts(model, images[0].device)
    with _counted(counts):
        losses = model(images, targets)
    for count in counts:
        own, total = count.total.clamp_min(count.least), distributed.divisor(count.total, count.least)
        for name in count.losses:
            losses[name] = losses[name] * (own / total)
    return losses


@dataclass
class _Count:
    """Counts what a part of a detector returns, in place of which it stands; its losses divide by that."""

    owner: nn.Module
    name: str
    """of the attribute that is the part"""
    part: Any
    count: Callable[[Any], Tensor]
    losses: Sequence[str]
    total: Tensor
    least: float = 0.0

    def __call__(self, *inputs: Any) -> Any:
        result = self.part(*inputs)
        self.total = self.total + self.count(result)
        return result


def _counts(model: nn.Module, device: torch.device) -> list[_Count]:
    none = torch.zeros((), device=device)
    if isinstance(model, SSD):
        losses = ("bbox_regression", "classification")
        return [_Count(model, "proposal_matcher", model.proposal_matcher, _matched, losses, none, least=1.0)]
    assert isinstance(model, FasterRCNN)
    heads, names = (model.rpn, model.roi_heads), ("loss_objectness", "loss_rpn_box_reg")
    return [
        _Count(head, "fg_bg_sampler", head.fg_bg_sampler, _sampled, losses, none)
        for head, losses in zip(heads, (names, ("loss_classifier", "loss_box_reg")), strict=True)
    ]


@contextmanager
def _counted(counts: Sequence[_Count]) -> Iterator[None]:
    try:
        for count in counts:
            setattr(count.owner, count.name, count)
        yield
    finally:
        for count in counts:
            setattr(count.owner, count.name, count.part)


def _matched(object_of_anchor: Tensor) -> Tensor:
    return (object_of_anchor >= 0).sum()


def _sampled(masks: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    return torch.stack([mask.sum() for kind in masks for mask in kind]).sum()
