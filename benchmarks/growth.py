"""How do time and memory grow with a batch, images, classes, boxes and cells? Faster than linearly?

    OMP_NUM_THREADS=1 python benchmarks/growth.py                          # everything, several minutes
    python benchmarks/growth.py --kinds step --models ssd_tiny --repeats 2 --output growth.json

    kind      what one call does                                          grows with
    step      a training step at W4A8, batch norm frozen                  batch, side, classes, boxes
    detect    a detector on a batch, all scores above its threshold       batch, classes
    voc       matching and VOC's APs                                      images, classes, boxes
    coco      COCO's AP                                                   images, classes, boxes
    sweep     a sweep of empty runs of ssd_tiny                           cells

Along a line one number grows and the others stay. Every point of a line has a process of its own, whose peak
memory (Linux's VmHWM) is printed; the processes work in turns, so that a change of clock slows all of them.
Times are medians of turns; the ratio to the first point is taken within a turn. The exponent of a point is
that of the power law through it and the one before: 1 is linear, and less where a constant part counts.

SSDs resize images to their own size: `side` is that of the images that they are given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD

import lbdet
from lbdet.cli import sweep_bits
from lbdet.data.shapes import render_shapes
from lbdet.deploy.benchmark_worker import peak_memory
from lbdet.metrics import coco_ap
from lbdet.metrics.boxes import Sample
from lbdet.metrics.voc import average_precision, match
from lbdet.models import build_detector
from lbdet.nn.batch_norm import recalibrate_bn, set_training_mode

CONFIG = Path(__file__).parents[1] / "configs/demo_shapes.yaml"
MODELS = ("ssd_tiny", "ssdlite320_mobilenet_v3_large")
DETECTIONS = 300
"""an image, as many as SSDlite320 returns"""


@dataclass(frozen=True)
class Point:
    """What one process measures."""

    kind: str
    model: str = ""
    batch: int = 2
    side: int = 320
    classes: int = 20
    boxes: int = 10
    images: int = 100
    cells: int = 1


LINES: dict[str, dict[str, Sequence[int]]] = {
    "step": {
        "batch": (1, 2, 4, 8, 16),
        "side": (160, 320, 512),
        "classes": (20, 80, 1200),
        "boxes": (1, 10, 100, 500),
    },
    "detect": {"batch": (1, 4, 16), "classes": (20, 80, 1200)},
    "voc": {"images": (100, 400, 1600), "classes": (20, 80, 1200), "boxes": (1, 10, 100, 500)},
    "coco": {"images": (50, 100, 200), "classes": (20, 80, 1200), "boxes": (1, 10, 100, 500)},
    "sweep": {"cells": (1, 2, 4, 8)},
}


def detector(point: Point) -> tuple[nn.Module, list[Tensor]]:
    """Build a detector of random weights at W4A8, and a batch of random images."""
    torch.manual_seed(0)
    images = list(torch.rand(max(2, point.batch), 3, point.side, point.side))
    model = build_detector(point.model, [f"class{c}" for c in range(point.classes)])
    recalibrate_bn(model, [images[:2]])  # or random weights overflow
    lbdet.quantize_model(model, "W4A8")
    lbdet.calibrate_activations(model, lambda: [images[:2]])
    return model.to(memory_format=torch.channels_last), images[: point.batch]


def step(point: Point) -> Callable[[], None]:
    """Return what trains a detector on one batch."""
    model, images = detector(point)
    set_training_mode(model, "frozen")
    corner, size = point.side / 2 * torch.rand(2, point.batch, point.boxes, 2)
    labels = torch.randint(1, point.classes + 1, (point.batch, point.boxes))
    boxes = torch.cat([corner, corner + size + 8], -1)
    targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def run() -> None:
        torch.stack(list(model(images, targets).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def detect(point: Point) -> Callable[[], None]:
    """Return what detects on one batch; every class has as many candidates as there can be."""
    model, images = detector(point)
    assert isinstance(model, SSD)
    model.eval().score_thresh = 0.0

    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def draw_scene(point: Point) -> tuple[list[Sample], list[Sample]]:
    """Draw random objects, and detections of them of which half are far off; an entry an image."""
    rng = np.random.default_rng(0)
    found: list[Sample] = []
    truth: list[Sample] = []
    for _ in range(point.images):
        corner, size = rng.uniform(0, 400, (point.boxes, 2)), rng.uniform(8, 120, (point.boxes, 2))
        boxes = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
        labels = rng.integers(1, point.classes + 1, point.boxes)
        truth.append({"boxes": boxes, "labels": labels, "difficult": rng.random(point.boxes) < 0.1})
        of = rng.integers(0, point.boxes, DETECTIONS)
        far = np.where(rng.random((DETECTIONS, 1)) < 0.5, 3, 60)
        moved = boxes[of] + np.tile(rng.normal(0, far, (DETECTIONS, 2)), 2)
        found.append({"boxes": moved, "labels": labels[of], "scores": rng.random(DETECTIONS)})
    return found, truth


def voc(point: Point) -> Callable[[], None]:
    """Return what computes both of VOC's APs."""
    scene = draw_scene(point)

    def run() -> None:
        for matches in match(*scene, point.classes):
            average_precision(matches, "voc07")
            average_precision(matches, "area")

    return run


def coco(point: Point) -> Callable[[], None]:
    """Return what computes COCO's AP."""
    scene = draw_scene(point)

    def run() -> None:
        coco_ap(*scene, point.classes, areas=False)

    return run


def sweep(point: Point) -> Callable[[], None]:
    """Return what runs a sweep of `cells` cells that train nothing, on 8 + 4 images."""
    folder = tempfile.TemporaryDirectory()
    render_shapes(Path(folder.name, "shapes"), train=8, val=4)
    settings = ["data.name=voc", f"data.root={folder.name}/shapes", "train.max_steps=0"]
    cells = ["--precisions", "float", "--seeds", *map(str, range(point.cells))]  # all take equally long

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=folder.name) as output:
            arguments = ["--config", str(CONFIG), "--set", *settings, *cells, "--output", output]
            assert sweep_bits.main(arguments) == 0

    return run


KINDS = {"step": step, "detect": detect, "voc": voc, "coco": coco, "sweep": sweep}


def serve(point: Point, connection: Connection) -> None:
    """Do the work of a point once for each True that is received, send its seconds, then the peak memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        multiprocessing.set_start_method(None, force=True)  # workers that load images start as usual
        work = KINDS[point.kind](point)
        work()  # the first call allocates
        connection.send(None)
        while connection.recv():
            start = time.perf_counter()
            work()
            connection.send(time.perf_counter() - start)
    connection.send(peak_memory() / 1e6)


def measure(points: Sequence[Point], repeats: int) -> tuple[list[list[float]], list[float]]:
    """Return the seconds of all points in each turn, and their peak megabytes."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:  # closes all ends, so that every process stops if one fails
        ends = []
        for point in points:
            ours, theirs = context.Pipe()
            ends.append(stack.enter_context(ours))
            with theirs:
                context.Process(target=serve, args=(point, theirs)).start()
            ours.recv()
        turns = [[ask(end, True) for end in ends] for _ in range(repeats)]
        return turns, [ask(end, False) for end in ends]


def ask(end: Connection, go_on: bool) -> Any:
    """Send a request and return the answer."""
    end.send(go_on)
    return end.recv()


def lines(kinds: Sequence[str], models: Sequence[str]) -> Iterator[tuple[str, list[Point]]]:
    """Yield what grows and the points of each line."""
    for kind in kinds:
        for model in models if kind in ("step", "detect") else ("",):
            for name, values in LINES[kind].items():
                yield name, [replace(Point(kind, model), **{name: value}) for value in values]


def rows_of(name: str, points: Sequence[Point], repeats: int) -> list[dict[str, Any]]:
    """Measure a line; a row for each point."""
    turns, peaks = measure(points, repeats)
    ratios = [median(turn[i] / turn[0] for turn in turns) for i in range(len(points))]
    sizes = [getattr(point, name) for point in points]
    exponents: list[float | None] = [None]
    for (size, ratio), (next_size, next_ratio) in pairwise(zip(sizes, ratios, strict=True)):
        exponents.append(math.log(next_ratio / ratio) / math.log(next_size / size))
    return [
        asdict(point)
        | {"grows": name, "seconds": median(turn[i] for turn in turns), "ratio": ratios[i]}
        | {"exponent": exponents[i], "peak_mb": peaks[i]}
        for i, point in enumerate(points)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one line a point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.repeats} turns")
    print("kind    model     grows          seconds   ratio  exponent  peak [MB]")
    table = []
    for name, points in lines(options.kinds, options.models):
        table += rows_of(name, points, options.repeats)
        print("\n".join(map(text, table[-len(points) :])), flush=True)
    if options.output:
        options.output.write_text(json.dumps(table, indent=1) + "\n")


def text(row: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    grows = f"{row['grows']} {row[row['grows']]}"
    exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
    measured = f"{row['seconds']:8.3f}  {row['ratio']:6.2f}  {exponent:>8}  {row['peak_mb']:9.0f}"
    return f"{row['kind']:6}  {row['model'][:8]:8}  {grows:13}  {measured}"


if __name__ == "__main__":
    main()
