"""Two detectors, one batch: the second takes the very pixels and boxes that the first one made of the images.

torchvision's detectors resize, normalise and pad images in their own forward pass, Faster R-CNN to a short
side that it draws from several. Places of two models can only be compared on the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD


class SameBatch:
    """Keeps the transformed batch of a model's last forward pass; a classifier's is its input already.

    Args:
        model: watched from now on, until `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._batch: Any = None
        transforms = [model.transform] if isinstance(model, SSD | GeneralizedRCNN) else []
        self._handles = [transform.register_forward_hook(self._keep) for transform in transforms]

    @contextmanager
    def given_to(self, other: nn.Module) -> Iterator[None]:
        """Let `other`, in training mode, take this batch inside, whatever images it is called with."""
        if not isinstance(other, SSD | GeneralizedRCNN):
            yield
            return
        detector: Any = other  # whose transform may be any module
        transform, detector.transform = detector.transform, _Given(self._batch)
        try:
            yield
        finally:
            detector.transform = transform

    def close(self) -> None:
        """Stop watching the model."""
        for handle in self._handles:
            handle.remove()
        self._batch = None

    def _keep(self, _: nn.Module, __: Any, batch: Any) -> None:
        self._batch = batch


class _Given(nn.Module):
    """Stands in for a detector's transform."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self._batch = batch

    def forward(self, images: Any, targets: Any = None) -> Any:
        return self._batch

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Return the (no) detections as they are; Faster R-CNN calls it in training too."""
        return result
