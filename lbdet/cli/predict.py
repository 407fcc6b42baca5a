"""`predict.py`: what an exported model finds on photographs, in folders of them, or in a stream.

    predict.py model.xml photo.jpg folder --output drawn
    producer | predict.py model.onnx --jsonl | consumer

With --jsonl each image gives a line of JSON, flushed at once: {"image": ..., "detections": [...]} with label,
score and box [x1, y1, x2, y2] of each, of a classifier "labels" without boxes, or {"image": ..., "error": ..}
where it is no image. Without INPUT images are read from stdin as they come, a line {"image": "path"} each. An
image that cannot be used does not stop the others; the exit code is 2 then.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lbdet.cli import exit_code
from lbdet.deploy import Predictor, load
from lbdet.deploy.pictures import SUFFIXES, read_picture
from lbdet.errors import UserError

SCORE = 0.4
TOP = 5
"""so many classes of a classifier are told"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, predict, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=".onnx, .xml or .lbw, from tools/export.py")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="a photograph, or a folder of some")
    parser.add_argument("--output", type=Path, metavar="DIR", help="draw what is found, a PNG each")
    parser.add_argument("--score", type=float, default=SCORE, help=f"least score that is told ({SCORE})")
    parser.add_argument("--jsonl", action="store_true", help="a line of JSON each; see above")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0 = as it finds right")
    return exit_code(partial(_predict, parser.parse_args(argv)))


def _predict(args: argparse.Namespace) -> None:
    _check(args)
    files = _files(args.inputs)
    predictor = load(args.model, args.threads)
    pictures = Pictures(args.output, predictor) if args.output else None
    if pictures is not None:
        pictures.prepare(files)
    images: Iterable[str | UserError] = files if args.inputs else _lines(sys.stdin.buffer)
    failed = total = 0
    for image in images:
        total += 1
        result = _one(predictor, image, args.score, pictures)
        failed += "error" in result
        (_tell_json if args.jsonl else _tell)(result)
    if failed:
        raise UserError(
            f"{failed} of {total} images: must be usable, got the errors above; all others are done"
        )


def _one(
    predictor: Predictor, image: str | UserError, score: float, pictures: Pictures | None
) -> dict[str, Any]:
    """Return what is found on an image, or what is wrong with it, as plain data."""
    if isinstance(image, UserError):
        return {"error": str(image)}
    try:
        pixels = read_picture(image)
        found = predictor(pixels)
        if "boxes" in found:
            found = {key: values[found["scores"] >= score] for key, values in found.items()}
        if pictures is not None:
            pictures.draw(image, pixels, found)
    except UserError as error:
        return {"image": image, "error": str(error)}
    return {"image": image, **_plain(predictor, found)}


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.score <= 1:
        raise UserError(f"--score: must lie in [0, 1], got {args.score}")
    if args.threads < 0:
        raise UserError(f"--threads: must not be negative, got {args.threads}")
    if not args.inputs and not args.jsonl:
        raise UserError("INPUT: must be a photograph or a folder, got none; with --jsonl stdin is read")


def _files(inputs: Sequence[str]) -> list[str | UserError]:
    """Return the files, and the images of the folders, sorted within each.

    Raises:
        UserError: an address, a path that does not exist, or a folder without images.
    """
    files: list[str | UserError] = []
    for given in inputs:
        path = Path(given)
        if "://" in given:
            raise UserError(f"INPUT: must be a local file, got {given!r}; download it first")
        if path.is_dir():
            found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{path}: must hold {', '.join(SUFFIXES)} files, got none")
            files += found
        elif path.exists():
            files.append(str(path))
        else:
            raise UserError(f"{path}: does not exist")
    return files


def _lines(stream: Iterable[bytes]) -> Iterator[str | UserError]:
    """Yield the paths that a stream names as they come, or what is wrong with a line; blank ones are none."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            image = given.get("image") if isinstance(given, dict) else None
        except (ValueError, RecursionError):
            image = None
        if isinstance(image, str) and "\0" not in image:
            yield image
        else:
            yield UserError(
                f'line {number}: must be like {{"image": "photo.jpg"}}, got {line.strip()[:60]!r}'
            )


def _plain(predictor: Predictor, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return detections, or a classifier's best classes, as plain data."""
    rows = [
        {"label": predictor.name(label), "score": round(float(score), 4)}
        for label, score in zip(found["labels"], found["scores"], strict=True)
    ]
    if "boxes" not in found:
        return {"labels": rows[:TOP]}
    boxes = np.round(found["boxes"].astype(float), 2).tolist()
    return {"detections": [{**row, "box": box} for row, box in zip(rows, boxes, strict=True)]}


def _tell_json(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def _tell(result: dict[str, Any]) -> None:
    if "error" in result:
        print(f"error: {result['error']}", file=sys.stderr, flush=True)
        return
    kind = "detections" if "detections" in result else "labels"
    lines = [f"{result['image']}: {len(result[kind])} {kind}"]
    for row in result[kind]:
        box = " ".join(f"{value:7.1f}" for value in row.get("box", ()))
        lines.append(f"  {row['score']:.3f}  {row['label']:<14} {box}".rstrip())
    print("\n".join(lines), flush=True)


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures with detections drawn, a PNG each; a name that is taken gets a number."""

    folder: Path
    predictor: Predictor
    names: set[str] = field(default_factory=set)

    def prepare(self, files: Sequence[str | UserError]) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made, holds the images themselves, or the model has no boxes.
        """
        if self.predictor.task != "detection":
            raise UserError("--output: is for detectors, got a classifier; leave it out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {self.folder} cannot be made: {error.strerror}") from None
        for file in files:
            self._refuse_own_folder(str(file))

    def draw(self, image: str, pixels: np.ndarray, found: dict[str, np.ndarray]) -> None:
        """Draw the detections of an image.

        Raises:
            UserError: the picture cannot be written.
        """
        from lbdet.report.draw import draw_detections

        self._refuse_own_folder(image)
        path, content = self.folder / self._new_name(Path(image).stem), io.BytesIO()
        draw_detections(pixels, found, self.predictor.classes).save(content, format="PNG")
        try:
            path.write_bytes(content.getbuffer())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None

    def _refuse_own_folder(self, image: str) -> None:
        if Path(image).resolve().parent == self.folder.resolve():
            raise UserError(
                f"--output: must not be where the images are, got {self.folder}; name another folder"
            )

    def _new_name(self, stem: str) -> str:
        name, count = f"{stem}.png", 1
        while name in self.names:
            count += 1
            name = f"{stem}_{count}.png"
        self.names.add(name)
        return name
