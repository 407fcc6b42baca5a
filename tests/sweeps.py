"""A sweep's folder as `sweep_bits.py` leaves it, with made-up numbers; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.metrics.coco import to_coco_results
from lbdet.precision import Precision

Found = list[dict[str, np.ndarray]]
"""One image each: boxes, labels, scores."""
SIZES = {"float": 1_166_120, "W2": 96_000, "W3": 118_000, "W4": 142_000, "W4A8": 142_400, "W8A8": 300_000}
MEANS = {"float": 0.75, "W2": 0.52, "W3": 0.66, "W4": 0.749, "W4A8": 0.715, "W8A8": 0.748}
CELLS = (
    ("float", "float", 0), ("float", "float", 1),
    ("qat", "W2", 0), ("qat", "W4", 1), ("qat", "W4", 0), ("qat", "W4A8", 0), ("qat", "W8A8", 0),
    ("ptq", "W2", 0), ("ptq", "W4", 0),
)  # fmt: skip


def val_of(devkit: Path) -> DetectionData:
    """Read what the cells were evaluated on."""
    return read_voc(devkit, ["2012:val"], SHAPE_CLASSES)


def found_at(data: DetectionData, precision: str, seed: int) -> Found:
    """Return detections that are worse at fewer bits: true boxes, some of them missing, moved or made up."""
    width = Precision.parse(precision)
    bits = width.weight_bits or 9
    rng = np.random.default_rng((bits, width.act_bits or 0, seed))
    images: Found = []
    for record in data.records:
        keep = rng.random(len(record.labels)) < 0.35 + 0.07 * bits
        boxes = record.boxes[keep] + rng.normal(0, 8 / bits, (keep.sum(), 4)).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        extra = rng.integers(0, max(1, 6 - bits) + 1)
        corners = rng.uniform(0, [record.width / 2, record.height / 2], (extra, 2))
        made_up = np.concatenate([corners, corners + rng.uniform(10, 40, (extra, 2))], axis=1)
        labels = np.concatenate([record.labels[keep], rng.integers(1, len(data.classes) + 1, extra)])
        scores = rng.uniform(0.3, 1, len(labels))
        images.append({"boxes": np.concatenate([boxes, made_up]), "labels": labels, "scores": scores})
    return images


def cell_entry(series: str, precision: str, seed: int, **changes: Any) -> dict[str, Any]:
    """Return the entry of a cell that is done."""
    width, mean = (
        Precision.parse(precision),
        MEANS[precision] * (0.1 if series == "ptq" else 1) + 0.004 * seed,
    )
    name = f"{series}_{precision}_seed{seed}"
    return {
        "name": name, "folder": f"cells/{name}", "series": series, "precision": precision,
        "weight_bits": width.weight_bits, "act_bits": width.act_bits, "seed": seed, "ratio": None,
        "state": "done", "error": None, "command": f"python tools/train_det.py --set seed={seed}",
        "metrics": metrics_of(mean), "bytes": SIZES[precision],
        "bits_per_weight": None if precision == "float" else 3.2, "zeros": 0.12, "squared_error": 0.041,
        "latency_ms": None, "steps": 636,
    } | changes  # fmt: skip


def metrics_of(mean: float) -> dict[str, Any]:
    """Return a metrics.json whose mean is over the first four classes."""
    per_class = {
        name: {"voc07": mean + 0.02 * (k - 1.5), "voc_area": mean, "coco": mean / 2, "objects": 10 + k}
        for k, name in enumerate(SHAPE_CLASSES)
    }
    return {"voc07_map": mean, "voc_area_map": mean, "coco_map": mean / 2, "per_class": per_class,
            "scored_classes": list(SHAPE_CLASSES[:4]), "steps": 636}  # fmt: skip


def coverage_of(precision: str, layers: int = 6) -> list[dict[str, Any]]:
    """Return a coverage.json; the last layer's is as older versions wrote it, without counts."""
    width = Precision.parse(precision)
    bits = width.weight_bits
    magnitudes = (
        [2.0**-k for k in range(2 ** ((bits or 2) - 2))][::-1] if (bits or 2) < 8 else list(range(1, 128))
    )
    levels = [-m for m in magnitudes[::-1]] + [0.0] + magnitudes
    report = []
    for k in range(layers):
        counts = [(7 * i + 13 * k) % 50 + 1 for i in range(len(levels))]
        row = {"name": f"body.{k}.conv", "kind": "conv2d", "weights": sum(counts), "bits": bits,
               "act_bits": width.act_bits, "format": None, "zeros": None, "squared_error": None,
               "levels": None, "reason": "its precision is float now"}  # fmt: skip
        if bits is not None:
            row |= {"format": "lbw", "zeros": 0.1 + 0.01 * k, "squared_error": 0.04, "levels": levels,
                    "counts": counts, "reason": None}  # fmt: skip
        report.append(row)
    report[-1].pop("counts", None)
    report[-1]["levels"] = len(levels)
    return report


def write_sweep(
    folder: Path,
    devkit: Path,
    entries: Sequence[dict[str, Any]] | None = None,
    detect: Callable[[DetectionData, str, int], Found] = found_at,
    **changes: Any,
) -> Path:
    """Write a sweep's folder, with the runs of the cells that are done.

    Args:
        entries: the cells; None = two seeds of float, and a few widths of two series.
        detect: what a cell found.
        changes: of the top level of sweep.json.
    """
    cells = [cell_entry(*place) for place in CELLS] if entries is None else list(entries)
    data = val_of(devkit)
    ids = [record.id for record in data.records]
    for cell in cells:
        if cell["state"] == "done":
            run = folder / cell["folder"]
            run.mkdir(parents=True)
            found = detect(data, cell["precision"], cell["seed"])
            (run / "detections.json").write_text(json.dumps(to_coco_results(found, ids)))
            (run / "coverage.json").write_text(json.dumps(coverage_of(cell["precision"])))
            (run / "metrics.json").write_text(json.dumps(cell["metrics"]))
            (run / "config.yaml").write_text(yaml.safe_dump(config_of(devkit, cell)))
    content = {"version": 1, "command": "python tools/sweep_bits.py --bits 2 4 <all>", "metric": "voc07_map",
               "metric_name": "VOC 11-point mAP", "cells": cells}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(content | changes))
    return folder


def config_of(devkit: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a cell."""
    return {
        "model": {"name": "ssd_tiny"},
        "data": {"name": "voc", "root": str(devkit), "train": ["2012:train"], "val": ["2012:val"],
                 "classes": "shapes"},
        "quantizer": {"weight": {"format": "lbw"}},
        "schedule": {"target": cell["precision"]},
        "seed": cell["seed"],
    }  # fmt: skip
