"""How many images a second does a worker prepare, and how long does training wait for them?

    OMP_NUM_THREADS=1 python benchmarks/data.py                             # on datasets/voc_subset
    python benchmarks/data.py --images 32 --steps 0 --output data.json      # the first table alone

First table: milliseconds that one worker spends on an image to decode it, to augment it, and for the rest (to
make planes of it, to pack its batch and to unpack that), for each augmentation; images a second; the ratio of
the whole to decoding. The augmentations take turns, so that a change of clock slows all; medians of turns.

Second table: an SSDlite320 trains at W4 on batches of 16 with 0, 1 and 2 workers in turn. What share of a
step is spent waiting for its batch? The first batch of a turn, for which workers must start, is left out.

Without the data set, generated scenes take its place.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import torch
from torch import Tensor

import lbdet
from lbdet.classes import VOC20
from lbdet.data.augment import build_augmentation
from lbdet.data.images import read_image
from lbdet.data.loader import Target, TrainSet, train_batches
from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES, render_shapes
from lbdet.data.voc import read_voc
from lbdet.engine.evaluate import to_model
from lbdet.models import build_detector

DATA = Path("datasets/voc_subset/VOCdevkit")
AUGMENTATIONS = ("none", "flip", "ssd", "multiscale")
BATCH_SIZE = 16
WORKERS = (0, 1, 2)
Step = Callable[[list[Tensor], list[Target]], None]


def read_data(count: int, folder: Path) -> DetectionData:
    """Read the first images of the data set, or of one that is rendered into a folder."""
    if DATA.is_dir():
        data = read_voc(DATA, ["2012:val"], VOC20)
        return data.take(range(min(count, len(data))))
    render_shapes(folder / "shapes", train=count, val=1, size=(400, 300))
    return read_voc(folder / "shapes", ["2012:train"], SHAPE_CLASSES)


def stages(data: DetectionData, name: str) -> dict[str, float]:
    """Return milliseconds an image, in this process."""
    augmentation = build_augmentation(name)
    decode = augment = 0.0
    for index, record in enumerate(data.records):
        start = time.perf_counter()
        image = read_image(record.path)
        decoded = time.perf_counter()
        augmentation(image, record.boxes, record.labels, index)
        decode += decoded - start
        augment += time.perf_counter() - decoded
    start = time.perf_counter()
    steps = len(data) // BATCH_SIZE
    for _ in train_batches(TrainSet(data, augmentation, seed=0), BATCH_SIZE, 0, 0, steps, workers=0):
        pass
    total = (time.perf_counter() - start) / (steps * BATCH_SIZE)
    decode, augment = decode / len(data), augment / len(data)
    return {"decode": decode, "augment": augment, "rest": total - decode - augment, "total": total}


def measure_stages(data: DetectionData, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each augmentation; times in milliseconds."""
    turns = [{name: stages(data, name) for name in AUGMENTATIONS} for _ in range(repeats)]
    rows = []
    for name in AUGMENTATIONS:
        row = {key: 1e3 * median(turn[name][key] for turn in turns) for key in turns[0][name]}
        ratio = median(turn[name]["total"] / turn[name]["decode"] for turn in turns)
        rows.append({"augment": name, "ms": row, "images_a_second": 1e3 / row["total"], "ratio": ratio})
    return rows


def training_step(classes: Sequence[str]) -> Step:
    """Build an SSDlite320 of W4 and return what trains it on a batch; weights hardly change."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model, _ = lbdet.quantize_model(build_detector("ssdlite320_mobilenet_v3_large", classes), "W4")
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step(images: list[Tensor], targets: list[Target]) -> None:
        losses = model(to_model(images, torch.device("cpu")), targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def wait_and_work(
    step: Step, data: DetectionData, name: str, workers: int, steps: int
) -> tuple[float, float]:
    """Return the seconds that a step waits for its batch and those that it works, means over steps."""
    dataset = TrainSet(data, build_augmentation(name), seed=0)
    batches = train_batches(dataset, BATCH_SIZE, 0, 0, steps + 1, workers)
    step(*next(batches))
    wait = work = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        step(*batch)
        wait += ready - start
        work += time.perf_counter() - ready
    return wait / steps, work / steps


def measure_waiting(data: DetectionData, name: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each number of workers; seconds a step, and the share of waiting."""
    step = training_step(data.classes)
    turns = [{w: wait_and_work(step, data, name, w, steps) for w in WORKERS} for _ in range(repeats)]
    rows = []
    for workers in WORKERS:
        waits, works = zip(*(turn[workers] for turn in turns), strict=True)
        share = median(wait / (wait + work) for wait, work in zip(waits, works, strict=True))
        rows.append({"workers": workers, "wait": median(waits), "work": median(works), "share": share})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96, help="in the first table (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="in a turn of the second (default: %(default)s)")
    parser.add_argument("--augment", choices=AUGMENTATIONS, default="ssd", help="in the second table")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    if options.images < BATCH_SIZE or options.steps < 0 or options.repeats < 1:
        parser.error(f"--images must be at least {BATCH_SIZE}, --steps 0 and --repeats 1")
    cv2.setNumThreads(0)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        data = read_data(options.images, Path(folder))
        print(f"{len(data)} images of {DATA if DATA.is_dir() else 'generated scenes'}")
        rows = measure_stages(data, options.repeats)
        print("augment     decode [ms]  augment  rest   total  images/s  total / decode")
        for row in rows:
            ms, rate = row["ms"], row["images_a_second"]
            times = f"{ms['decode']:11.2f}  {ms['augment']:7.2f}  {ms['rest']:4.2f}  {ms['total']:6.2f}"
            print(f"{row['augment']:10}  {times}  {rate:8.0f}  {row['ratio']:14.2f}", flush=True)
        waiting = (
            measure_waiting(data, options.augment, options.steps, options.repeats) if options.steps else []
        )
    for row in waiting:
        times = f"waits {1e3 * row['wait']:6.1f} ms, works {1e3 * row['work']:6.1f} ms"
        print(f"{row['workers']} workers, {options.augment}: a step {times}: {row['share']:.1%} waiting")
    if options.output:
        options.output.write_text(json.dumps({"stages": rows, "waiting": waiting}, indent=1) + "\n")


if __name__ == "__main__":
    main()
