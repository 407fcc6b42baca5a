"""Evaluation is detection in order, then the metrics of `lbdet.metrics`; without an object there is null."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lbdet.data.images import read_image
from lbdet.data.records import DetectionData, spread_images
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine.evaluate import detect, evaluate, score
from lbdet.metrics import voc_ap
from lbdet.metrics.coco import coco_ap
from lbdet.models.ssd_tiny import ssd_tiny


@pytest.fixture(scope="module")
def val(devkit) -> DetectionData:
    return read_voc(devkit, ["2012:val"], SHAPE_CLASSES)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return ssd_tiny(len(SHAPE_CLASSES) + 1)


def truth(data: DetectionData) -> list[dict[str, np.ndarray]]:
    return [{"boxes": r.boxes, "labels": r.labels, "difficult": r.difficult} for r in data.records]


def almost_right(data: DetectionData) -> list[dict[str, np.ndarray]]:
    """Detections that are the objects, shifted by different amounts, and scored at random."""
    rng = np.random.default_rng(0)
    return [
        {
            "boxes": r.boxes + rng.integers(0, 9, (len(r.boxes), 1)).astype(np.float32),
            "labels": r.labels,
            "scores": rng.uniform(size=len(r.boxes)).astype(np.float32),
        }
        for r in data.records
    ]


def test_detections_are_those_of_each_image_alone_in_the_pixels_of_its_file(model, val):
    found = detect(model, val, batch_size=1, workers=1)
    assert len(found) == len(val.records)
    for record, detections in zip(val.records, found, strict=True):
        image = torch.from_numpy(read_image(record.path).transpose(2, 0, 1).copy()).float() / 255
        with torch.no_grad():
            (alone,) = model.eval()([image])
        assert len(detections["scores"]) == len(alone["scores"]) > 0
        np.testing.assert_allclose(detections["boxes"], alone["boxes"].numpy(), atol=1e-3)
        assert (detections["boxes"] <= [record.width, record.height] * 2).all()


def test_the_metrics_are_those_of_the_metrics_package(val):
    found = almost_right(val)
    metrics = score(found, val, None)
    for name, metric in (("voc07_map", "voc07"), ("voc_area_map", "area")):
        expected = voc_ap(found, truth(val), len(val.classes), metric)
        assert metrics[name] == pytest.approx(np.nanmean(expected))
        assert 0 < metrics[name] < 1
    coco = coco_ap(found, truth(val), len(val.classes))
    assert metrics["coco"] == {key: pytest.approx(coco[key]) for key in ("ap", "ap50", "ap75")}
    assert metrics["coco_map"] == pytest.approx(np.nanmean(coco["per_class"]))


def test_score_classes_restrict_the_means_and_not_the_table(val):
    found = almost_right(val)
    chosen = ("star", "disc")
    metrics = score(found, val, chosen)
    values = [metrics["per_class"][name]["voc07"] for name in chosen]
    assert None not in values
    assert metrics["voc07_map"] == pytest.approx(np.mean(values))
    assert metrics["scored_classes"] == list(chosen)
    assert metrics["per_class"] == score(found, val, None)["per_class"]


def test_a_class_without_objects_is_null_and_no_part_of_the_mean(val):
    data = DetectionData((*val.classes, "cube"), val.records)
    with_cube, without = score(almost_right(val), data, None), score(almost_right(val), val, None)
    assert with_cube["per_class"]["cube"] == {"voc07": None, "voc_area": None, "coco": None, "objects": 0}
    assert with_cube["voc07_map"] == without["voc07_map"]
    assert json.loads(json.dumps(with_cube, allow_nan=False)) == with_cube
    assert score(almost_right(val), data, ["cube"])["voc07_map"] is None


def test_a_detector_that_finds_nothing_scores_zero(val):
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    metrics = score([nothing] * len(val.records), val, None)
    assert (metrics["voc07_map"], metrics["voc_area_map"], metrics["coco"]["ap"]) == (0, 0, 0)


def test_batch_size_and_workers_change_no_metric(model, val):
    metrics = [evaluate(model, val, None, batch, workers).metrics for batch, workers in ((1, 0), (6, 1))]
    assert metrics[0]["voc07_map"] == pytest.approx(metrics[1]["voc07_map"], abs=1e-6)
    assert metrics[0]["images"] == 6


def test_no_number_or_too_large_a_one_keeps_all_images(val):
    assert spread_images(val, None) == spread_images(val, 99) == val


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [*range(6)]), (7, [*range(6)])]
)
def test_spread_images_reach_from_the_first_to_the_last(val, count, expected):
    assert spread_images(val, count).records == tuple(val.records[i] for i in expected)
