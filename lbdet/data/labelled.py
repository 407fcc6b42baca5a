"""Images with one label each, and how they reach a classifier.

The items fit `train_batches` and `eval_batches` of the loader. Labels count from 0: there is no background.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lbdet.data.augment import Augmentation, derive_seed
from lbdet.data.images import read_image
from lbdet.errors import UserError
from lbdet.images import decode_image

CROP_RATIO = 0.875
"""Side of the centre that is evaluated / short side of the resized image: 224 of 256."""

_NO_BOXES, _NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


class Images(Protocol):
    """Images by their place. A uint8 array `[N, H, W, 3]` is one, memory-mapped or not."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Return an image, uint8 `[H, W, 3]`, RGB."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Images in files, decoded as they are asked for."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return read_image(self.paths[index])


@dataclass(frozen=True)
class EncodedImages:
    """JPEG files in memory, decoded as they are asked for. One array of all, which workers share."""

    names: tuple[str, ...]
    """What an error calls each."""
    data: np.ndarray
    """uint8 `[B]`: the files, one behind the other"""
    ends: np.ndarray
    """int64 `[N]`: where each ends in `data`"""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> np.ndarray:
        start = self.ends[index - 1] if index else 0
        file = io.BytesIO(self.data[start : self.ends[index]].tobytes())
        return decode_image(file, self.names[index], formats=("JPEG",))


@dataclass(frozen=True)
class _Picked:
    """Some of other images."""

    images: Images
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.images[int(self.places[index])]


@dataclass(frozen=True)
class LabelledData:
    """A data set for classification: its classes (label k is `classes[k]`) and its images."""

    classes: tuple[str, ...]
    labels: np.ndarray
    """int64 `[N]`, from 0"""
    images: Images

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        """Return image `index` in 0..N-1, contiguous uint8 `[H, W, 3]`, RGB; maybe a view, not to be changed.

        Raises:
            UserError: where its file is missing or damaged.
        """
        return np.ascontiguousarray(self.images[index])

    def take(self, indices: Sequence[int]) -> LabelledData:
        """Return the data set of some images, in the given order; nothing is copied but the labels."""
        places = np.asarray(indices, np.int64)
        return LabelledData(self.classes, self.labels[places], _Picked(self.images, places))


class LabelledTrainSet(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Augmented images and labels; an item depends on the seed and its key `(epoch, index)` alone.

    Items have one size where the images do and the augmentation keeps it (`none`, `flip`, `cifar`), or where
    it makes one (`imagenet`).
    """

    def __init__(self, data: LabelledData, augmentation: Augmentation, seed: int) -> None:
        self.data = data
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image, uint8 `[3, H, W]`, and `{"label": int64 []}`.

        Raises:
            UserError: where the image file is missing or damaged.
        """
        epoch, index = key
        seed = derive_seed("augment", self.seed, epoch, index)
        image, _, _ = self.augmentation(self.data.image(index), _NO_BOXES, _NO_LABELS, seed)
        return _to_tensor(image), {"label": torch.tensor(int(self.data.labels[index]))}


class LabelledEvalSet(Dataset[tuple[Tensor, int]]):
    """Images in order, each with its index; whole ones, or the centre of each.

    Args:
        data: the images.
        image_size: side of the centre, see `resize_and_crop`; None = images as they are.
    """

    def __init__(self, data: LabelledData, image_size: int | None = None) -> None:
        self.data = data
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image, uint8 `[3, H, W]`, and index. Raises UserError as `LabelledTrainSet` does."""
        image = self.data.image(index)
        if self.image_size is not None:
            image = resize_and_crop(image, self.image_size)
        return _to_tensor(image), index


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the short side of an image to `size / 0.875` and cut out the centre, `size` x `size`.

    Sizes are rounded as torchvision's presets for evaluation do. Interpolation is by area (`cv2.INTER_AREA`)
    where the image shrinks, else linear; torchvision's has a wider filter.

    Args:
        image: uint8 `[H, W, 3]`.
        size: pixels, at least 1.

    Returns:
        uint8 `[size, size, 3]`, maybe a view of a new array.
    """
    height, width = image.shape[:2]
    short, old = round(size / CROP_RATIO), min(height, width)
    height, width = short * height // old, short * width // old
    how = cv2.INTER_AREA if short < old else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=how)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[top : top + size, left : left + size]


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images `[3, H, W]` to a batch `[N, 3, H, W]`.

    Raises:
        UserError: they have several sizes.
    """
    sizes = sorted({(image.shape[2], image.shape[1]) for image in images})
    if len(sizes) > 1:
        got = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise UserError(
            f"images: must have one size in a batch, got {got}; "
            "train with augment 'imagenet' and evaluate with an image_size"
        )
    return torch.stack(list(images))


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())  # never a view: arrays of a data set stay as is
