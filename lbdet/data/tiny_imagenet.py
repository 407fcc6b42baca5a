"""Read Tiny ImageNet, the official archive without unpacking it, its unpacked folder, or a selection of it.

    tiny-imagenet-200/       official, a .zip or a folder    selection/    a folder
      wnids.txt                the 200 classes                 labels.csv    split, wnid, name, file
      words.txt                their names                     <any>.zip     the files that it lists
      train/<wnid>/images/*.JPEG
      val/images/*.JPEG, val/val_annotations.txt

Classes are in the order of their WordNet ids. A name is the first of its words in `words.txt`; a name that
two classes share gets its id behind it.
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbdet.data.files import open_regular, read_text, reason
from lbdet.data.labelled import EncodedImages, ImageFiles, LabelledData
from lbdet.data.problems import Problem, raise_problems
from lbdet.errors import UserError, one_line, short

_SPLITS = ("train", "val")
_COLUMNS = ("split", "wnid", "name", "file")
_MAX_BYTES = 2**30  # unpacked; the images of the official split have a fifth
_MAX_LIST = 16 << 20  # bytes of a list or table; words.txt has 2.6 MB
_NOT_ZIP = (
    OSError,
    ValueError,  # also text that is no UTF-8, and a member of another length than its entry says
    EOFError,
    RuntimeError,  # encrypted; NotImplementedError is one
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class _Listing:
    """Which images a split has."""

    names: Mapping[str, str]
    """WordNet id -> name of the class, in any order"""
    items: Sequence[tuple[str, str]]
    """file, WordNet id"""


def read_tiny_imagenet(path: str | os.PathLike[str], split: str) -> LabelledData:
    """Read a split of Tiny ImageNet, 64 x 64 pixels; grey images become RGB.

    The files of an archive are read into memory at once, their checksums checked; nothing is unpacked.

    Args:
        path: `tiny-imagenet-200.zip`, the folder `tiny-imagenet-200`, or one with a `labels.csv`.
        split: "train" or "val"; the official test images have no labels.

    Raises:
        UserError: another split, a damaged archive, or lists and files that do not fit.
    """
    if split not in _SPLITS:
        raise UserError(f"split: must be train or val, got {split!r}; the images of test have no labels")
    path = Path(path)
    if (path / "labels.csv").is_file():
        return _read_selection(path, split)
    if path.is_dir():
        return _read_folder(path, split)
    return _read_archive(path, split)


def _read_folder(path: Path, split: str) -> LabelledData:
    files = {file.relative_to(path).as_posix() for file in path.glob(f"{split}/**/*.JPEG")}
    try:
        listing = _official(files, lambda name: read_text(path / name, _MAX_LIST), split)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: file does not exist; give the folder tiny-imagenet-200"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: its lists must be UTF-8 text, got {reason(error)}") from error
    classes, labels = _checked(path, listing, files)
    images = ImageFiles(tuple(str(path / file) for file, _ in listing.items))
    return LabelledData(classes, labels, images)


def _read_archive(path: Path, split: str) -> LabelledData:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            tops = [name[:-9] for name in archive.namelist() if f"/{name}".endswith("/wnids.txt")]
            if len(tops) != 1:
                raise UserError(
                    f"{path}: must hold one wnids.txt, got {len(tops)}; give the official archive"
                )
            top = tops[0]
            files = {name[len(top) :] for name in archive.namelist() if name.startswith(top)}
            listing = _official(
                files, lambda name: _read(archive, [top + name], _MAX_LIST).decode("utf-8"), split
            )
            classes, labels = _checked(path, listing, files)
            return LabelledData(classes, labels, _encoded(archive, path, top, listing))
    except (*_NOT_ZIP, KeyError) as error:  # KeyError: a list is not there
        raise _not_a_zip(path, error) from error


def _read_selection(path: Path, split: str) -> LabelledData:
    archives = sorted(path.glob("*.zip"))
    if len(archives) != 1:
        raise UserError(f"{path}: must hold labels.csv and one .zip file, got {len(archives)}")
    listing = _selected(path / "labels.csv", split)
    try:
        with open_regular(archives[0]) as file, zipfile.ZipFile(file) as archive:
            classes, labels = _checked(path / "labels.csv", listing, set(archive.namelist()))
            return LabelledData(classes, labels, _encoded(archive, archives[0], "", listing))
    except _NOT_ZIP as error:
        raise _not_a_zip(archives[0], error) from error


def _not_a_zip(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: file does not exist")
    got = one_line(reason(error), 200)
    return UserError(f"{path}: must be the whole archive of Tiny ImageNet, got {got}; fetch it anew")


def _official(files: Collection[str], text: Callable[[str], str], split: str) -> _Listing:
    """List a split of the official layout; `text` reads a list by its name."""
    wnids = text("wnids.txt").split()
    words = dict(line.split("\t", 1) for line in text("words.txt").splitlines() if "\t" in line)
    names = {wnid: words.get(wnid, "").split(",")[0].strip() or wnid for wnid in wnids}
    if split == "train":
        matches = [re.fullmatch(r"train/([^/]+)/images/[^/]+\.JPEG", file) for file in sorted(files)]
        return _Listing(names, [(match[0], match[1]) for match in matches if match])
    rows = [line.split("\t") for line in text("val/val_annotations.txt").splitlines() if line.strip()]
    return _Listing(names, [(f"val/images/{row[0]}", row[1] if len(row) > 1 else "") for row in rows])


def _selected(path: Path, split: str) -> _Listing:
    """List a split of a selection; its classes are those of all splits."""
    try:
        file = io.StringIO(read_text(path, _MAX_LIST), newline="")
        rows = [[row[column] for column in _COLUMNS] for row in csv.DictReader(file, restval="")]
    except KeyError as error:
        raise UserError(f"{path}: must have columns {', '.join(_COLUMNS)}, got no {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: must be a table in UTF-8 text, got {reason(error)}") from error
    for number, row in enumerate(rows, start=1):
        if not all(row):
            got = one_line(str(row), 200)
            raise UserError(f"{path}: row {number} must have {', '.join(_COLUMNS)}, got {got}")
    names = {wnid: name for _, wnid, name, _ in rows}
    return _Listing(names, [(file, wnid) for of, wnid, _, file in rows if of == split])


def _checked(where: Path, listing: _Listing, files: Collection[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes and the labels of a listing whose files and classes all exist."""
    wnids = sorted(listing.names)
    if not wnids:
        raise UserError(f"{where}: must list classes, got none")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    used = {wnid for _, wnid in listing.items}
    problems: list[Problem] = [
        Problem(wnid, "class must have images, got none") for wnid in wnids if wnid not in used
    ]
    for file, wnid in listing.items:
        if wnid not in labels:
            problems.append(
                Problem(file, f"class must be one of the {len(labels)} listed, got {short(wnid)}")
            )
        elif file not in files:
            problems.append(Problem(file, "image must exist, got none"))
    raise_problems(where, problems)
    shared = Counter(listing.names.values())
    names = ((listing.names[wnid], wnid) for wnid in wnids)
    classes = tuple(name if shared[name] == 1 else f"{name} ({wnid})" for name, wnid in names)
    return classes, np.array([labels[wnid] for _, wnid in listing.items], np.int64)


def _encoded(archive: zipfile.ZipFile, path: Path, top: str, listing: _Listing) -> EncodedImages:
    """Read the files of a listing into one array."""
    members = [top + file for file, _ in listing.items]
    data = np.frombuffer(_read(archive, members, _MAX_BYTES), np.uint8)
    ends = np.cumsum([archive.getinfo(member).file_size for member in members])
    return EncodedImages(tuple(f"{path}/{member}" for member in members), data, ends)


def _read(archive: zipfile.ZipFile, members: Sequence[str], limit: int) -> bytearray:
    """Read members, one behind the other; `zipfile` checks the checksum of each."""
    entries = [archive.getinfo(member) for member in members]
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise NotImplementedError("another compression than deflate")
    total = sum(entry.file_size for entry in entries)
    if total > limit:
        raise ValueError(f"{total} bytes to unpack")
    data = bytearray()
    for member in members:
        data += archive.read(member)
    if len(data) != total:
        raise EOFError("files shorter than their entries say")
    return data
