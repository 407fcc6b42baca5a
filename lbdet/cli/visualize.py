"""`visualize.py`: draw a run's detections on your own photographs, alone or beside another model's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lbdet.build import Built, check_kind, load_run
from lbdet.cli import exit_code
from lbdet.convert import calibrate_activations, set_float, set_scheduled_precision, uncalibrated
from lbdet.data.images import read_image
from lbdet.engine.evaluate import to_model
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.files import write_atomically
from lbdet.metrics import diff_detections
from lbdet.precision import FLOAT, Precision
from lbdet.report.draw import draw_detections, draw_pair

SUFFIXES = (".jpg", ".jpeg", ".png")
CALIBRATION_IMAGES = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, draw, and return the exit code."""
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="a folder that training left")
    parser.add_argument("--images", required=True, nargs="+", metavar="FILE|FOLDER", help="JPEG and PNG")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for a PNG of each image")
    parser.add_argument(
        "--against", metavar="RUN_OR_PRECISION",
        help="the reference, drawn on the left: another run's folder, such as a float run's, or this run's "
        "weights at another precision, such as W6 or float (unrounded, which is no float detector)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=0.4, help="least score that is drawn (default 0.4)"
    )
    args = parser.parse_args(argv)
    return exit_code(
        partial(visualize, args.run, args.images, Path(args.output), args.against, args.threshold)
    )


def visualize(
    run: str, images: Sequence[str], output: Path, against: str | None = None, threshold: float = 0.4
) -> None:
    """Draw a run's detections on images, a PNG each in `output`;
    with `against` two models side by side, compared.

    Raises:
        UserError: no such run, image or reference; a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold: must lie in [0, 1], got {threshold}")
    files = find_images(images)
    names = _names(files)
    for file in files:
        if any((output / name).resolve() == file.resolve() for name in names):
            raise UserError(
                f"--output: must not be where the images are, {file} would be lost; name another folder"
            )
    ours = load_run(run)
    check_kind(ours.config, classification=False)
    reference, title = _reference(against, run, ours) if against else (None, "")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made: {error.strerror}") from None
    if reference is not None and uncalibrated(reference.model):
        inputs = partial(map, partial(_input, reference.model), files[:CALIBRATION_IMAGES])
        say(f"activations calibrated on {calibrate_activations(reference.model, inputs)} of these images")
    counts = np.zeros(3, dtype=int)
    for file, name in zip(files, names, strict=True):
        image = read_image(file, exif=True)
        found = detect_one(ours.model, image, threshold)
        if reference is None:
            picture = draw_detections(image, found, ours.classes)
            say(f"{output / name}: {len(found['scores'])} detections")
        else:
            theirs = detect_one(reference.model, image, threshold)
            diff = diff_detections(theirs, found)
            picture = draw_pair(
                image, theirs, found, diff, ours.classes, (title, str(ours.config.schedule.target))
            )
            count = np.array([len(diff.kept), len(diff.lost), len(diff.new)])
            counts += count
            say("{}: kept {}, lost {}, new {}".format(output / name, *count))
        write_atomically(output / name, partial(picture.save, format="PNG"))
    if reference is not None:
        say("{} images: kept {}, lost {}, new {}".format(len(files), *counts))


def find_images(paths: Sequence[str]) -> list[Path]:
    """Return the files, and the JPEG and PNG files of the folders, sorted within each.

    Raises:
        UserError: an address, a path that does not exist, or a folder without images.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if "://" in given:
            raise UserError(f"--images: must be local files, got {given!r}; download it first")
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"--images: {path} must hold {', '.join(SUFFIXES)} files, got none")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--images: {path} does not exist")
    return files


def _input(model: nn.Module, file: Path) -> list[torch.Tensor]:
    image = np.ascontiguousarray(read_image(file, exif=True).transpose(2, 0, 1))
    return to_model([torch.from_numpy(image)], next(model.parameters()).device)


@torch.no_grad()
def detect_one(model: nn.Module, image: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Run a detector on one image, uint8 `[H, W, 3]`; detections with a score of at least `threshold`."""
    model.eval()
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    (found,) = model(to_model([tensor], next(model.parameters()).device))
    kept = found["scores"] >= threshold
    return {key: value[kept].cpu().numpy() for key, value in found.items()}


def _reference(against: str, run: str, ours: Built) -> tuple[Built, str]:
    """Return the model to compare with, and its title."""
    if Path(against).is_dir():
        other = load_run(against)
        if other.classes != ours.classes:
            raise UserError(
                f"--against: {against} must have the classes of {run}, got {', '.join(other.classes[:5])} ..."
            )
        name, target = Path(against).name, str(other.config.schedule.target)
        return other, name if name == target else f"{name} ({target})"
    try:
        precision = Precision.parse(against)
    except UserError:
        raise UserError(
            f"--against: must be a run's folder or a precision like float, got {against!r}"
        ) from None
    other = load_run(run)
    try:
        if precision == FLOAT:
            set_float(other.model)
        else:
            set_scheduled_precision(other.model, precision)
    except UserError as error:
        raise UserError(f"--against: {error}") from None
    star = ""
    if precision == FLOAT and ours.config.schedule.target != FLOAT:
        star = "*"
        say("float*: this run's weights unrounded; for a float detector give a float run to --against")
    return other, f"{precision}{star} (same weights)"


def _names(files: Sequence[Path]) -> list[str]:
    """Return an output name a file; those that several folders share get a number."""
    names: list[str] = []
    for file in files:
        name, count = f"{file.stem}.png", 1
        while name in names:
            count += 1
            name = f"{file.stem}_{count}.png"
        names.append(name)
    return names
