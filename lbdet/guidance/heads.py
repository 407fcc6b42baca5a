"""What the heads of two models say of the same input.

The student says it in its own forward pass; a frozen teacher is asked behind it, one that is trained has a
pass of its own. Both see the student's transformed batch. An SSD's anchors are the same in both; a Faster
R-CNN's teacher scores the student's anchors and sampled proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.ssd import SSD


@dataclass(frozen=True)
class Scores:
    """The outputs of one head for N places: anchors or proposals of all images, or the images themselves."""

    logits: Tensor
    """`[N, C]`; C = 1 is a yes or no"""
    boxes: Tensor | None
    """`[N, 4]` deltas, or `[N, C, 4]` of each class; None for a classifier"""
    background: bool
    """whether class 0 is the background"""

    def detach(self) -> Scores:
        """Return the same without a graph."""
        boxes = None if self.boxes is None else self.boxes.detach()
        return Scores(self.logits.detach(), boxes, self.background)


class Recorder(ABC):
    """Keeps what a model's last forward pass saw and said."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[str, Any] = {}
        self._handles = self._watch(model)

    def close(self) -> None:
        """Stop watching the model."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    @abstractmethod
    def said(self) -> list[Scores]:
        """Return what the model said in its last forward pass, with its graph."""

    def said_of(self, student: Recorder) -> list[Scores]:
        """Return what the model says of the places of `student`, with its graph, after its own forward pass.

        Args:
            student: the recorder of a model of the same architecture, which saw the same pixels.
        """
        return self.said()

    @abstractmethod
    def ask(self, teacher: nn.Module) -> list[Scores]:
        """Return what `teacher` says of the places of this model; it must be in eval mode."""

    @abstractmethod
    def _watch(self, model: nn.Module) -> list[RemovableHandle]: ...

    def _input_of(self, module: nn.Module, name: str) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda _, inputs: self._seen.__setitem__(name, inputs))

    def _output_of(self, module: nn.Module, name: str) -> RemovableHandle:
        return module.register_forward_hook(lambda _, __, output: self._seen.__setitem__(name, output))


class SsdRecorder(Recorder):
    """All anchors of an SSD."""

    def _watch(self, model: nn.Module) -> list[RemovableHandle]:
        assert isinstance(model, SSD)
        return [self._input_of(model.backbone, "images"), self._output_of(model.head, "head")]

    def said(self) -> list[Scores]:
        return [_ssd_scores(self._seen["head"])]

    def ask(self, teacher: nn.Module) -> list[Scores]:
        assert isinstance(teacher, SSD)
        return [_ssd_scores(teacher.head(list(teacher.backbone(*self._seen["images"]).values())))]


class FasterRcnnRecorder(Recorder):
    """All anchors of the region proposal network, and the proposals that the student sampled."""

    def _watch(self, model: nn.Module) -> list[RemovableHandle]:
        assert isinstance(model, FasterRCNN)
        self._model = model
        heads: Any = model.roi_heads
        rpn: Any = model.rpn
        return [
            self._input_of(model.backbone, "images"),
            self._output_of(rpn.head, "rpn"),
            self._input_of(heads.box_roi_pool, "pool"),
            self._output_of(heads.box_predictor, "predictor"),
        ]

    def said(self) -> list[Scores]:
        return [_rpn_scores(*self._seen["rpn"]), _roi_scores(*self._seen["predictor"])]

    def said_of(self, student: Recorder) -> list[Scores]:
        features, *_ = self._seen["pool"]  # those of its own pass
        return [_rpn_scores(*self._seen["rpn"]), _score(self._model, features, student)]

    def ask(self, teacher: nn.Module) -> list[Scores]:
        assert isinstance(teacher, FasterRCNN)
        rpn: Any = teacher.rpn
        features = teacher.backbone(*self._seen["images"])
        return [_rpn_scores(*rpn.head(list(features.values()))), _score(teacher, features, self)]


class ClassifierRecorder(Recorder):
    """The logits of a classifier."""

    def _watch(self, model: nn.Module) -> list[RemovableHandle]:
        return [self._input_of(model, "images"), self._output_of(model, "logits")]

    def said(self) -> list[Scores]:
        return [Scores(self._seen["logits"], None, background=False)]

    def ask(self, teacher: nn.Module) -> list[Scores]:
        return [Scores(teacher(*self._seen["images"]), None, background=False)]


def recorder_for(student: nn.Module) -> Recorder:
    """Return the recorder of a model's architecture; what is no detector counts as a classifier."""
    if isinstance(student, SSD):
        return SsdRecorder(student)
    if isinstance(student, FasterRCNN):
        return FasterRcnnRecorder(student)
    return ClassifierRecorder(student)


def _ssd_scores(output: dict[str, Tensor]) -> Scores:
    return Scores(
        output["cls_logits"].flatten(0, 1), output["bbox_regression"].flatten(0, 1), background=True
    )


def _rpn_scores(objectness: list[Tensor], deltas: list[Tensor]) -> Scores:
    """Put the anchors of all levels, `[N, A, H, W]` and `[N, 4 A, H, W]`, in one order."""
    logits = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 1) for level in objectness])
    boxes = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 4) for level in deltas])
    return Scores(logits, boxes, background=False)


def _score(model: FasterRCNN, features: dict[str, Tensor], student: Recorder) -> Scores:
    """Return what `model` says of the student's proposals on feature maps of its own."""
    heads: Any = model.roi_heads
    _, proposals, sizes = student._seen["pool"]
    return _roi_scores(*heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, sizes))))


def _roi_scores(logits: Tensor, deltas: Tensor) -> Scores:
    return Scores(logits, deltas.view(*logits.shape, 4), background=True)
