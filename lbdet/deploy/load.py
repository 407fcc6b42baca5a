"""Run an exported model: numpy, PIL and the engine are all that is imported; torch for packed files alone.

from lbdet.deploy import load

detect = load("detector.onnx")             # or .xml, OpenVINO's, or .lbw, which torch runs
found = detect("photo.jpg")                # or a list; or a PIL image; or uint8 [H, W, 3], RGB
found["boxes"], found["labels"], found["scores"]
[detect.name(label) for label in found["labels"]]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from lbdet.deploy.engines import Engine, OnnxEngine, OpenvinoEngine
from lbdet.deploy.pictures import Picture, read_picture
from lbdet.errors import UserError

Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Predictor:
    """An exported model, ready to be called."""

    engine: Engine

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, without background."""
        return tuple(self.engine.facts["classes"])

    @property
    def task(self) -> str:
        """`detection` or `classification`."""
        return self.engine.facts["task"]

    def name(self, label: int) -> str:
        """Return the class of a label: detectors count from 1 (0 is background), classifiers from 0."""
        return self.classes[int(label) - (self.task == "detection")]

    @overload
    def __call__(self, images: Picture) -> Found: ...
    @overload
    def __call__(self, images: Sequence[Picture]) -> list[Found]: ...
    def __call__(self, images: Picture | Sequence[Picture]) -> Found | list[Found]:
        """Find objects in an image, or in each of several.

        Args:
            images: a path, a PIL image, or uint8 `[H, W, 3]` in RGB; or a list of such. Files and PIL images
                are turned upright as their EXIF says.

        Returns:
            Of each image `boxes` float32 `[N, 4]` in its pixels, `labels` int64 `[N]` and `scores` float32
            `[N]`, the best first. A classifier gives `labels` and `scores` of all classes, the best first.

        Raises:
            UserError: an image that is missing, damaged or no image.
        """
        if isinstance(images, (np.ndarray, Image.Image, str, os.PathLike)):
            return self._one(images)
        return [self._one(image) for image in images]

    def _one(self, picture: Picture) -> Found:
        image = read_picture(picture)
        if self.task == "detection":
            return self.engine.run(image)
        scores = self.engine.run(_cropped(image, self.engine.facts))["scores"]
        labels = np.argsort(-scores, kind="stable")
        return {"labels": labels, "scores": scores[labels]}


def load(path: str | os.PathLike[str], threads: int = 0) -> Predictor:
    """Load a file that `tools/export.py` wrote.

    Args:
        path: `.onnx`, OpenVINO's `.xml`, or packed, `.lbw`.
        threads: that the engine uses; 0 = as many as it finds right. Those of torch are the process's.

    Raises:
        UserError: no such file, another kind of file, a damaged one, or an engine that is not installed.
    """
    path = Path(path)
    if path.suffix not in LOADERS:
        raise UserError(
            f"{path}: model must end in {', '.join(LOADERS)}, got {path.suffix!r}; export it first"
        )
    if not path.is_file():
        raise UserError(f"{path}: model does not exist; write it with tools/export.py")
    return Predictor(LOADERS[path.suffix](path, threads))


def _packed(path: Path, threads: int) -> Engine:
    from lbdet.deploy.torch_engine import TorchEngine  # the one engine that needs torch

    return TorchEngine(path, threads)


LOADERS: dict[str, Callable[[Path, int], Engine]] = {
    ".onnx": OnnxEngine,
    ".xml": OpenvinoEngine,
    ".lbw": _packed,
}
"""Suffix -> engine."""


def _cropped(image: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    """Return an image as a classifier takes it: of its very size, or scaled and its centre cut out.

    As `lbdet.data.labelled.resize_and_crop`, but with PIL's filters.
    """
    size, short = facts["image_size"], facts["short_side"]
    height, width = image.shape[:2]
    if short is None:
        if (height, width) != (size, size):
            raise UserError(
                f"image: must be {size}x{size} for this classifier, got {width}x{height}; resize it"
            )
        return image
    old = min(height, width)
    height, width = short * height // old, short * width // old
    how = Image.Resampling.BOX if short < old else Image.Resampling.BILINEAR
    resized = np.asarray(Image.fromarray(image).resize((width, height), how))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(resized[top : top + size, left : left + size])
