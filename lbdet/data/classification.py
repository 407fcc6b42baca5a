"""Read labelled images: folders of classes, CIFAR, arrays in one `.npz` file.

Every reader checks what it can without decoding images, and returns `LabelledData`.
"""

from __future__ import annotations

import math
import os
import tarfile
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.lib.format import read_array, read_array_header_1_0, read_array_header_2_0, read_magic
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from lbdet.data.files import open_regular, reason
from lbdet.data.labelled import ImageFiles, LabelledData
from lbdet.data.problems import Problem, Scan
from lbdet.data.voc import label_map
from lbdet.errors import UserError, closest, one_line, short

MAX_ARRAYS = 4 << 30
"""Bytes of the arrays of a `.npz` file that are read."""
_SUFFIXES = (".jpg", ".jpeg", ".png")
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def read_image_folder(
    root: str | os.PathLike[str], split: str, classes: Sequence[str] | None = None
) -> LabelledData:
    """Read the JPEG and PNG files of `root/split/<class>/`, folders below included.

    As with torchvision's `ImageFolder`, classes are the sorted names of the folders, and images are sorted by
    class folder and path. Files that are no images are passed over.

    Args:
        root: the folder of the data set.
        split: the folder in it.
        classes: label k is `classes[k]`; one without a folder has no image. None = the sorted folders.

    Raises:
        UserError: no such folder, a class folder that is not listed or holds no image, an image of another
            format.
    """
    return scan_image_folder(root, split, classes).whole(Path(root, split))


def scan_image_folder(
    root: str | os.PathLike[str], split: str, classes: Sequence[str] | None = None
) -> Scan[LabelledData]:
    """Read what can be read, and list all problems. Args as for `read_image_folder`.

    Raises:
        UserError: no such folder, or no class folder in it.
    """
    top = Path(root, split)
    if not top.is_dir():
        there = sorted(path.name for path in Path(root).iterdir()) if Path(root).is_dir() else []
        raise UserError(f"{root}: must have a folder {split!r}, got none{closest(split, there)}")
    folders = sorted(entry.name for entry in os.scandir(top) if entry.is_dir())
    if not folders:
        raise UserError(f"{top}: must hold a folder for each class, got none")
    names = tuple(folders if classes is None else classes)
    numbers = label_map(names)
    problems: list[Problem] = []
    paths: list[str] = []
    labels: list[int] = []
    for folder in folders:
        if folder not in numbers:
            rule = f"must be one of the {len(names)} classes, got a folder {short(folder)}"
            problems.append(Problem(folder, f"{rule}{closest(folder, names)}"))
            continue
        images = [path for path in _files(top / folder) if path.lower().endswith(IMG_EXTENSIONS)]
        other = [path for path in images if not path.lower().endswith(_SUFFIXES)]
        for path in other:
            rule = f"image must be JPEG or PNG, got {Path(path).suffix}; convert it"
            problems.append(Problem(os.path.relpath(path, top), rule, "image", path))
        if not images:
            problems.append(Problem(folder, "class folder must hold an image, got none"))
        paths += images
        labels += [numbers[folder] - 1] * len(images)
    data = LabelledData(names, np.array(labels, np.int64), ImageFiles(tuple(paths)))
    return Scan(data, tuple(problems))


def read_cifar(root: str | os.PathLike[str], name: str, split: str, download: bool = False) -> LabelledData:
    """Read CIFAR-10 or CIFAR-100 (fine labels), 32 x 32 pixels, from the official files for Python.

    The files are pickles; torchvision's reader checks the MD5 of every one before it opens the first.

    Args:
        root: holds `cifar-10-batches-py` or `cifar-100-python`.
        name: "cifar10" or "cifar100".
        split: "train" (50 000 images) or "test" (10 000).
        download: fetch what is missing (170 MB).

    Raises:
        UserError: another name or split, files that are missing or not the official ones, a failing download.
    """
    if name not in CIFAR:
        raise UserError(f"name: must be one of {', '.join(CIFAR)}, got {name!r}{closest(name, CIFAR)}")
    if split not in ("train", "test"):
        raise UserError(f"split: must be train or test, got {split!r}")
    reader = CIFAR[name]
    try:
        dataset = reader(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError, EOFError, HTTPException, tarfile.TarError) as error:
        if download:
            got = f"{type(error).__name__}: {error}; try again, or unpack {reader.url} there by hand"
            raise UserError(f"{root}: download of {name} failed, got {got}") from error
        found = Path(root, reader.base_folder).is_dir()
        raise UserError(
            f"{root}: must hold {reader.base_folder} with the official files (by MD5), "
            f"got {'missing or other files' if found else 'no such folder'}; "
            f"download it, or unpack {reader.url} there"
        ) from error
    return LabelledData(tuple(dataset.classes), np.array(dataset.targets, np.int64), dataset.data)


def read_npz(path: str | os.PathLike[str], split: str) -> LabelledData:
    """Read images from the arrays of a `.npz` file, as `numpy.savez` writes it; nothing is unpickled.

    Its keys:

        classes      text [C], label k is classes[k]
        x_<split>    uint8 [N, H, W, 3], RGB; or grey, [N, H, W] or [N, H, W, 1]
        y_<split>    whole numbers [N] in 0..C-1

    Args:
        path: the file.
        split: such as "train" for `x_train` and `y_train`.

    Raises:
        UserError: a missing or damaged file, a missing key, arrays of another dtype or shape, pickled ones.
    """
    keys = ("classes", f"x_{split}", f"y_{split}")
    names, images, labels = _arrays(path, keys)
    rules = (
        ("text [C], C >= 1", names, names.dtype.kind == "U" and names.ndim == 1 and names.size > 0),
        ("uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W], not empty", images, _are_images(images)),
        ("whole numbers [N]", labels, labels.dtype.kind in "iu" and labels.shape == images.shape[:1]),
    )
    for key, (rule, array, holds) in zip(keys, rules, strict=True):
        if not holds:
            raise UserError(f"{path}: {key} must be {rule}, got {array.dtype} {list(array.shape)}")
    classes = _texts(path, names)
    try:
        label_map(classes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise UserError(f"{path}: {keys[2]} must lie in 0..{len(classes) - 1}, got {outside[0]}")
    if images.ndim == 3:
        images = images[..., None]
    return LabelledData(classes, labels.astype(np.int64), np.broadcast_to(images, (*images.shape[:3], 3)))


def _texts(path: str | os.PathLike[str], names: np.ndarray) -> tuple[str, ...]:
    try:
        texts = tuple(map(str, names))
        "".join(texts).encode()
    except (ValueError, SystemError) as error:  # halves of surrogate pairs, code points that are none
        raise UserError(f"{path}: classes must be valid Unicode, got {reason(error)}") from error
    return texts


def _files(folder: Path) -> list[str]:
    """Return the paths of all files in a folder and below, links too, sorted by folder, then name."""
    files: list[tuple[str, str]] = []
    seen = {os.path.realpath(folder)}
    for below, folders, names in os.walk(folder, followlinks=True):
        files += [(below, name) for name in names]
        real = {name: os.path.realpath(os.path.join(below, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]  # a link may lead to a folder above
        seen.update(real.values())
    return [os.path.join(*place) for place in sorted(files)]


def _arrays(path: str | os.PathLike[str], keys: Sequence[str]) -> list[np.ndarray]:
    """Read some arrays of a `.npz` file whose entries tell how much memory they take."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            there = {name.removesuffix(".npy"): name for name in archive.namelist()}
            missing = [key for key in keys if key not in there]
            entries = [archive.getinfo(there[key]) for key in keys if key in there]
            if sum(entry.file_size for entry in entries) > MAX_ARRAYS:
                raise ValueError(f"arrays of more than {MAX_ARRAYS >> 30} GiB")
            arrays = [] if missing else [_array(archive, entry) for entry in entries]
    except FileNotFoundError as error:
        raise UserError(f"{path}: file does not exist") from error
    except Exception as error:  # damaged bytes can raise nearly anything, a lone array is no archive
        got = one_line(reason(error), 200)
        raise UserError(f"{path}: must be a whole .npz file of plain arrays, got {got}") from error
    if missing:
        found = one_line(", ".join(there) or "nothing", 200)
        raise UserError(f"{path}: must hold {', '.join(keys)}, got {found}")
    return arrays


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """Read an array; its header may ask for no more memory than the entry has bytes."""
    with archive.open(entry) as file:
        version = read_magic(file)
        read_header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}.get(version)
        if read_header is None:
            raise ValueError(f"an array of version {version}")
        shape, _, dtype = read_header(file)
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"an array of {dtype} {list(shape)} in {entry.file_size} bytes")
    with archive.open(entry) as file:
        return read_array(file, allow_pickle=False)


def _are_images(array: np.ndarray) -> bool:
    shape = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    return array.dtype == np.uint8 and shape and array.size > 0
