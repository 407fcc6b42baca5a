"""How long do VOC's and COCO's average precisions take, beside pycocotools?

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py        # 4952 images of datasets/voc2007_eval_oracle
    python benchmarks/evaluation.py --images 500 --output evaluation.json

Evaluates a real detector's 254 590 detections on VOC2007 test. The contenders take turns, so that a change of
clock slows all of them; the ratio to pycocotools, fed with lists of dicts in memory, is taken within a turn,
and medians are printed. Reading files is told apart. faster-coco-eval is measured where it is installed; it
and pycocotools always compute areas and recalls too.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lbdet.classes import VOC20
from lbdet.metrics import coco_ap
from lbdet.metrics.boxes import Sample
from lbdet.metrics.voc import average_precision, match

ORACLE = Path("datasets/voc2007_eval_oracle")
REFERENCE = "pycocotools"
Scene = tuple[list[Sample], list[Sample]]
"""detections and ground truth, an entry an image"""


def read_oracle(count: int) -> Scene:
    """Read the first images; VOC's coordinates become half-open boxes."""
    (folder,) = (ORACLE / "detections").iterdir()
    objects = json.loads(gzip.decompress((ORACLE / "gt_voc2007_test.json.gz").read_bytes()))
    rows: dict[str, list[list[float]]] = {image: [] for image in objects}
    for label, name in enumerate(VOC20, start=1):
        for line in gzip.decompress((folder / f"{name}.txt.gz").read_bytes()).decode().splitlines():
            image, *values = line.split()
            rows[image].append([label, *map(float, values)])
    chosen = list(objects)[:count]
    truth = [[[VOC20.index(name) + 1, hard, *box] for name, *box, hard in objects[image]] for image in chosen]
    found = [sample(rows[image], "scores", np.float32) for image in chosen]
    return found, [sample(table, "difficult", bool) for table in truth]


def sample(rows: Sequence[Sequence[float]], extra: str, dtype: type) -> Sample:
    """Make one image's entry from rows of label, extra and box."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    boxes = (table[:, 2:] - [1, 1, 0, 0]).astype(np.float32)
    return {"boxes": boxes, "labels": table[:, 0].astype(np.int64), extra: table[:, 1].astype(dtype)}


def as_coco(samples: Sequence[Sample], extra: str) -> list[dict[str, Any]]:
    """Return COCO's annotations (extra = difficult) or results (extra = scores)."""
    rows: list[dict[str, Any]] = []
    for image, entry in enumerate(samples):
        columns = (np.asarray(entry[key]).tolist() for key in ("boxes", "labels", extra))
        for (x1, y1, x2, y2), label, value in zip(*columns, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(rows) + 1, "image_id": image, "category_id": label, "bbox": box}
            rows.append(row | {"area": box[2] * box[3], "iscrowd": int(value), "score": value})
    return rows


def tool(classes: tuple[Any, Any], scene: Scene, num_classes: int) -> Callable[[], float]:
    """Return what computes AP with a tool of pycocotools' interface, and all that it computes beside it."""
    data_set, evaluator = classes
    found, truth = as_coco(scene[0], "scores"), as_coco(scene[1], "difficult")
    categories = [{"id": c} for c in range(1, num_classes + 1)]
    images = [{"id": image} for image in range(len(scene[0]))]

    def run() -> float:
        objects = data_set()
        objects.dataset = {"images": images, "categories": categories, "annotations": truth}
        objects.createIndex()
        evaluation = evaluator(objects, objects.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return float(evaluation.stats[0])

    return run


def contenders(scene: Scene, num_classes: int) -> dict[str, Callable[[], float]]:
    """Return what is compared, by name; each returns a mean average precision."""

    def voc() -> float:
        matches = match(*scene, num_classes)
        both = [[average_precision(c, metric) for c in matches] for metric in ("voc07", "area")]
        return float(np.nanmean(both[0]))

    works = {
        "lbdet VOC, 11-point and area": voc,
        "lbdet COCO": lambda: coco_ap(*scene, num_classes, areas=False)["ap"],
        "lbdet COCO with areas": lambda: coco_ap(*scene, num_classes)["ap"],
        REFERENCE: tool((COCO, COCOeval), scene, num_classes),
    }
    if find_spec("faster_coco_eval") is None:
        print("faster-coco-eval: left out, it is not installed")
        return works
    faster = import_module("faster_coco_eval")
    return works | {"faster-coco-eval": tool((faster.COCO, faster.COCOeval_faster), scene, num_classes)}


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """Return the wall-clock time of one call in seconds, and its result; what it prints is dropped."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    return time.perf_counter() - start, result


def measure(works: Mapping[str, Callable[[], float]], repeats: int) -> list[dict[str, Any]]:
    """Return each contender's result, median time, and median ratio to pycocotools' time in the same turn."""
    turns = [{name: timed(work) for name, work in works.items()} for _ in range(repeats)]
    rows = []
    for name in works:
        times = [turn[name][0] for turn in turns]
        ratios = [turn[name][0] / turn[REFERENCE][0] for turn in turns]
        rows.append(
            {"name": name, "mean_ap": turns[0][name][1], "seconds": median(times), "ratio": median(ratios)}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one line a contender."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4952, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    if min(options.images, options.repeats) < 1:
        parser.error("--images and --repeats must be at least 1")
    if not ORACLE.is_dir():
        parser.error(f"{ORACLE} is absent: see `make data`")
    start = time.perf_counter()
    scene = read_oracle(options.images)
    reading = time.perf_counter() - start
    counts = [sum(len(np.asarray(entry["labels"])) for entry in samples) for samples in scene]
    print(
        f"{len(scene[0])} images, {counts[0]} detections, {counts[1]} objects; reading them: {reading:.2f} s"
    )
    rows = measure(contenders(scene, len(VOC20)), options.repeats)
    print(f"contender                     mean AP  seconds  ratio to {REFERENCE}")
    for row in rows:
        print(
            f"{row['name']:28}  {row['mean_ap']:7.4f}  {row['seconds']:7.2f}  {row['ratio']:.4f}", flush=True
        )
    if options.output:
        options.output.write_text(json.dumps({"reading_seconds": reading, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
