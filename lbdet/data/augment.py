"""Augmentation of images and boxes as a pure function of a seed; albumentations does the work.

albumentations gives every transform of a pipeline the same seed, so that all of them fire together or not at
all. Here each transform gets its own, hashed from the seed of the call and its place in the pipeline.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the import below asks the network for updates

import albumentations as A
import cv2
import numpy as np
import yaml
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets

from lbdet.errors import UserError, closest, joined

MEAN_COLOUR = (124, 116, 104)
"""ImageNet's mean RGB: what detectors see as nothing."""

_BOX_RULES = {"min_visibility": 0.3, "min_width": 1.0, "min_height": 1.0}  # a file may have its own


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and texts to a seed of 64 bits; the same in every process, unlike Python's `hash`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Zoom(A.DualTransform):
    """Scale the image by a random factor on a canvas of the image's own size, at a random place.

    Below 1 the image shrinks and the rest of the canvas has the mean colour; above 1 a part of it fills the
    canvas. The factor is log-uniform in `scale_range`. A detector resizes its input, so this is SSD's
    zoom-out (arXiv 1512.02325) and large-scale jitter (arXiv 2012.07177) without their larger canvas.
    """

    _targets = (Targets.IMAGE, Targets.BBOXES)

    class InitSchema(BaseTransformInitSchema):
        """The arguments that albumentations checks."""

        scale_range: tuple[float, float]

    def __init__(self, scale_range: tuple[float, float], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.scale_range = scale_range

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window of the image that is seen and the window of the canvas where it goes."""
        low, high = self.scale_range
        scale = math.exp(self.py_random.uniform(math.log(low), math.log(high)))
        height, width = params["shape"][:2]
        whole = (0, 0, width, height)
        ratio = min(scale, 1 / scale)
        w, h = max(1, round(ratio * width)), max(1, round(ratio * height))
        x, y = self.py_random.randint(0, width - w), self.py_random.randint(0, height - h)
        part = (x, y, x + w, y + h)
        return {"source": whole, "target": part} if scale < 1 else {"source": part, "target": whole}

    def apply(
        self, img: np.ndarray, source: tuple[int, ...], target: tuple[int, ...], **params: Any
    ) -> np.ndarray:
        """Scale the source window of the image to the target window's size and paint a border around it."""
        x1, y1, x2, y2 = target
        part = img[source[1] : source[3], source[0] : source[2]]
        shrinks = x2 - x1 < source[2] - source[0]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        scaled = cv2.resize(part, (x2 - x1, y2 - y1), interpolation=how)
        border = y1, img.shape[0] - y2, x1, img.shape[1] - x2
        return cv2.copyMakeBorder(scaled, *border, cv2.BORDER_CONSTANT, value=MEAN_COLOUR)

    def apply_to_bboxes(
        self, bboxes: np.ndarray, source: tuple[int, ...], target: tuple[int, ...], **params: Any
    ) -> np.ndarray:
        """Move boxes, given and returned as fractions of the image, whose size the canvas has too."""
        (sx1, sy1, sx2, sy2), (tx1, ty1, tx2, ty2) = source, target
        height, width = params["shape"][:2]
        moved = bboxes.astype(np.float64)
        moved[:, [0, 2]] = ((moved[:, [0, 2]] * width - sx1) * (tx2 - tx1) / (sx2 - sx1) + tx1) / width
        moved[:, [1, 3]] = ((moved[:, [1, 3]] * height - sy1) * (ty2 - ty1) / (sy2 - sy1) + ty1) / height
        return moved


def _ssd() -> list[A.BasicTransform | A.BaseCompose]:
    """Distort colours, zoom out, crop, flip, as SSD does (arXiv 1512.02325, 2.2).

    Differs from the paper: a crop keeps boxes by their visible area, not their centre, and is one of four
    kinds (none, around all boxes, around their cores, anywhere) instead of one of six least overlaps.
    """
    still = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
    ranges = {
        "brightness": (0.875, 1.125),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-0.05, 0.05),
    }
    crops = [
        A.NoOp(p=0.15),
        A.BBoxSafeRandomCrop(erosion_rate=0.0, p=0.3),
        A.BBoxSafeRandomCrop(erosion_rate=0.3, p=0.25),
        A.RandomCropFromBorders(crop_left=0.35, crop_right=0.35, crop_top=0.35, crop_bottom=0.35, p=0.3),
    ]
    return [
        *(A.ColorJitter(**{**still, name: limits}, p=0.5) for name, limits in ranges.items()),
        Zoom(scale_range=(0.25, 1.0), p=0.5),
        A.OneOf(crops, p=1.0),
        A.HorizontalFlip(p=0.5),
    ]


def _ssdlite() -> list[A.BasicTransform | A.BaseCompose]:
    """Crop around objects or anywhere, and flip: a light form of `_ssd`, for fine-tuning."""
    crops = [
        A.NoOp(p=0.5),
        A.BBoxSafeRandomCrop(erosion_rate=0.0, p=0.2),
        A.BBoxSafeRandomCrop(erosion_rate=0.3, p=0.15),
        A.RandomCropFromBorders(crop_left=0.25, crop_right=0.25, crop_top=0.25, crop_bottom=0.25, p=0.15),
    ]
    return [A.OneOf(crops, p=1.0), A.HorizontalFlip(p=0.5)]


def _cifar() -> list[A.BasicTransform | A.BaseCompose]:
    """Pad by 4 pixels, crop the original size at random, flip: usual for CIFAR (arXiv 1512.03385, 4.2).

    Padding and cropping are one shift by -4..4 pixels along each axis. What comes in is black (0), as with
    torchvision's `RandomCrop(padding=4)`.
    """
    return [
        A.Affine(translate_px={"x": (-4, 4), "y": (-4, 4)}, interpolation=cv2.INTER_NEAREST, fill=0, p=1.0),
        A.HorizontalFlip(p=0.5),
    ]


def _imagenet(size: int) -> list[A.BasicTransform | A.BaseCompose]:
    """Crop 8 to 100 % of the area with a ratio of 3/4 to 4/3, resize to `size` x `size`, flip.

    The usual training of classifiers on ImageNet (arXiv 1409.4842, section 6). Interpolation is by area where
    a side shrinks, else linear.
    """
    crop = A.RandomResizedCrop(
        size=(size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), area_for_downscale="image", p=1.0
    )
    return [crop, A.HorizontalFlip(p=0.5)]


PRESETS: dict[str, Callable[[int], list[A.BasicTransform | A.BaseCompose]]] = {
    "none": lambda _: [],
    "flip": lambda _: [A.HorizontalFlip(p=0.5)],
    "ssd": lambda _: _ssd(),
    "ssdlite": lambda _: _ssdlite(),
    "multiscale": lambda _: [Zoom(scale_range=(0.4, 2.0), p=1.0), A.HorizontalFlip(p=0.5)],
    "cifar": lambda _: _cifar(),
    "imagenet": _imagenet,
}
"""Name -> builder of the transforms from the side of the images that are made, where a preset sets it."""


@dataclass(frozen=True)
class Augmentation:
    """A pipeline that can be called; make one by `build_augmentation`. Not for two threads at once."""

    name: str
    pipeline: A.Compose
    nodes: tuple[tuple[str, A.BasicTransform | A.BaseCompose], ...]
    """Every transform and group with its place, such as `/1/0`; a group comes before its members."""

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Transform one image and its boxes; equal arguments give an equal result.

        A box of which a step leaves less than 30 % visible, or less than a pixel in width or height, is
        dropped with its label; others are clipped. N = 0 is usual input, and usual output too.

        Args:
            image: uint8 `[H, W, 3]`.
            boxes: float32 `[N, 4]`, pixels, inside the image.
            labels: int64 `[N]`, below 2^24.
            seed: any integer.

        Returns:
            Image uint8 `[H', W', 3]` (maybe the given one), boxes float32 `[M, 4]`, labels int64 `[M]`.

        Raises:
            UserError: where a user's own pipeline fails, or makes something else than such an image.
        """
        for place, node in self.nodes:
            own = derive_seed(seed, place)
            node.set_random_state(np.random.default_rng(own), random.Random(own))
        height, width = image.shape[:2]
        try:
            out = self.pipeline(image=image, bboxes=np.column_stack([boxes, labels]).astype(np.float64))
        except Exception as error:
            if self.name in PRESETS:
                raise
            raise UserError(f"{self.name}: must work on {width}x{height} images, got {error}") from error
        made = out["image"]
        if not isinstance(made, np.ndarray) or made.dtype != np.uint8 or made.shape[2:] != (3,):
            got = f"{made.dtype} {list(made.shape)}; leave out what normalizes"
            raise UserError(f"{self.name}: image must stay uint8 [H, W, 3], got {got}")
        rows = np.asarray(out["bboxes"], dtype=np.float64).reshape(-1, np.shape(out["bboxes"])[-1])
        return made, rows[:, :4].astype(np.float32), rows[:, 4:].astype(np.int64).reshape(-1)


def build_augmentation(name_or_path: str, image_size: int = 224) -> Augmentation:
    """Build a preset, or the pipeline in a file that `albumentations.save(..., data_format="yaml")` wrote.

    Of a file's `bbox_params` only the thresholds (`min_visibility`, `min_area`, ...) are used.

    Args:
        name_or_path: one of `PRESETS`, or the file.
        image_size: side in pixels of the square images that `imagenet` makes; nothing else depends on it.

    Raises:
        UserError: for a name that is neither, and a file that is no pipeline of uint8 RGB images and boxes.
    """
    if name_or_path in PRESETS:
        return _augmentation(name_or_path, PRESETS[name_or_path](image_size), _BOX_RULES)
    if not Path(name_or_path).is_file():
        raise UserError(
            f"data.augment: must be one of {', '.join(PRESETS)} or an albumentations file, "
            f"got {name_or_path!r}{closest(name_or_path, PRESETS)}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # an unknown argument gets no more than a warning
            content = yaml.safe_load(Path(name_or_path).read_text(encoding="utf-8"))
            rules = {**_BOX_RULES, **(content["transform"].pop("bbox_params", None) or {})}
            rules = {key: value for key, value in rules.items() if key not in ("format", "label_fields")}
            augmentation = _augmentation(name_or_path, [A.from_dict(content)], rules)
    except Exception as error:  # KeyError, TypeError, pydantic's, ...: whatever the content provokes
        reason = joined(f"{type(error).__name__}: {error}")
        raise UserError(
            f"{name_or_path}: must be a pipeline that albumentations.save wrote, got {reason}"
        ) from error
    image, box = np.zeros((480, 640, 3), np.uint8), np.array([[160, 120, 480, 360]], np.float32)
    for seed in range(4):  # a Normalize shows now, not in the first batch
        augmentation(image, box, np.array([1]), seed)
    return augmentation


def _augmentation(name: str, transforms: list[Any], rules: dict[str, Any]) -> Augmentation:
    transforms = [*transforms, A.NoOp()]  # albumentations warns of a pipeline that does not touch boxes
    pipeline = A.Compose(transforms, bbox_params=A.BboxParams(format="pascal_voc", **rules))
    return Augmentation(name, pipeline, tuple(_walk(pipeline, "")))


def _walk(
    node: A.BasicTransform | A.BaseCompose, place: str
) -> Iterator[tuple[str, A.BasicTransform | A.BaseCompose]]:
    """Yield every node, parents first: a group hands its state down before its members get their own."""
    yield place, node
    if isinstance(node, A.BaseCompose):
        for number, child in enumerate(node.transforms):
            yield from _walk(child, f"{place}/{number}")
