"""COCO average precision: against pycocotools driven by hand from files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lbdet.metrics import coco_ap, to_coco_results

NUM_CLASSES = 4
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@pytest.fixture
def scene():
    """Forty images: detections are jittered objects and noise, so all averages lie well between 0 and 1."""
    rng = np.random.default_rng(1)
    detections, ground_truth = [], []
    for _ in range(40):
        n, noise = rng.integers(0, 6), rng.integers(0, 4)
        corner, size = (
            rng.uniform(0, 100, (n, 2)),
            np.exp(rng.uniform(2, 5.5, (n, 1))) * rng.uniform(0.7, 1.4, (n, 2)),
        )
        boxes, labels = np.concatenate([corner, corner + size], axis=1), rng.integers(1, NUM_CLASSES, n)
        ground_truth.append(
            {"boxes": boxes.astype(np.float32), "labels": labels, "difficult": rng.random(n) < 0.2}
        )
        jittered = boxes + rng.normal(0, 0.05, (n, 4)) * np.tile(size, 2)
        false = np.sort(rng.uniform(0, 300, (noise, 2, 2)), axis=1).reshape(noise, 4)
        detections.append(
            {
                "boxes": np.concatenate([jittered, false]).astype(np.float32),
                "labels": np.concatenate([labels, rng.integers(1, NUM_CLASSES, noise)]),
                "scores": np.concatenate([rng.uniform(0.3, 1, n), rng.uniform(0, 0.7, noise)]).astype(
                    np.float32
                ),
            }
        )
    return detections, ground_truth


def by_hand(detections, ground_truth, folder):
    """Write both files in COCO's formats and evaluate them as COCO's own demo does."""
    annotations, results = [], []
    for image, (sample, objects) in enumerate(zip(detections, ground_truth, strict=True)):
        for (x1, y1, x2, y2), label, hard in zip(
            *(objects[k].tolist() for k in ("boxes", "labels", "difficult")), strict=True
        ):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(hard)}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 100 + image, "category_id": label} | box
            )
        for (x1, y1, x2, y2), label, score in zip(
            *(sample[k].tolist() for k in ("boxes", "labels", "scores")), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": 100 + image, "category_id": label, "bbox": box, "score": score})
    truth = {
        "images": [{"id": 100 + image} for image in range(len(ground_truth))],
        "categories": [{"id": c} for c in range(1, NUM_CLASSES + 1)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_all_averages_equal_those_of_pycocotools_driven_by_hand(scene, tmp_path):
    expected = by_hand(*scene, tmp_path)
    actual = coco_ap(*scene, NUM_CLASSES)
    assert [actual[name] for name in NAMES] == pytest.approx(expected.stats[:6].tolist(), abs=1e-12)
    assert all(0.05 < actual[name] < 0.98 for name in NAMES)
    per_class = expected.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))
    assert actual["per_class"][:3] == pytest.approx(per_class[:3].tolist(), abs=1e-12)
    assert per_class[3] == -1
    assert math.isnan(actual["per_class"][3])


def test_without_areas_all_else_is_the_same_to_the_last_bit(scene):
    whole, without = coco_ap(*scene, NUM_CLASSES), coco_ap(*scene, NUM_CLASSES, areas=False)
    areas = {f"ap_{name}": math.nan for name in ("small", "medium", "large")}
    assert repr(whole | areas) == repr(without)


def test_detections_of_a_class_that_has_no_objects_or_only_difficult_ones_count_nowhere(scene, tmp_path):
    detections, ground_truth = scene
    for sample, objects in zip(detections, ground_truth, strict=True):
        sample["labels"][sample["scores"] < 0.4] = 4
        objects["difficult"][objects["labels"] == 2] = True
    expected = by_hand(*scene, tmp_path)
    actual = coco_ap(*scene, NUM_CLASSES)
    assert [actual[name] for name in NAMES] == pytest.approx(expected.stats[:6].tolist(), abs=1e-12)
    assert [math.isnan(ap) for ap in actual["per_class"]] == [False, True, False, True]


def test_nothing_is_printed(scene, capsys):
    coco_ap(*scene, NUM_CLASSES)
    assert capsys.readouterr().out == ""


def test_no_detections_score_zero_and_no_objects_score_nothing(scene):
    _, ground_truth = scene
    nothing = [
        {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)} for _ in ground_truth
    ]
    assert coco_ap(nothing, ground_truth, NUM_CLASSES)["ap"] == 0.0
    empty = [
        {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "difficult": np.zeros(0, bool)}
        for _ in nothing
    ]
    assert all(math.isnan(coco_ap(nothing, empty, NUM_CLASSES)[name]) for name in NAMES)
    assert math.isnan(coco_ap([], [], NUM_CLASSES)["ap"])
    assert math.isnan(coco_ap([], [], 0)["ap"])


def test_a_perfect_detector_scores_one_and_difficult_objects_do_not_count():
    boxes, labels = np.array([[0.0, 0, 50, 50], [60, 0, 99, 99]]), np.array([1, 1])
    found = {"boxes": boxes, "labels": labels, "scores": np.array([0.5, 0.9])}
    result = coco_ap([found], [{"boxes": boxes, "labels": labels, "difficult": np.array([False, True])}], 1)
    assert (result["ap"], result["per_class"]) == (pytest.approx(1.0), [pytest.approx(1.0)])
    assert math.isnan(result["ap_small"])


def test_a_hundred_detections_of_a_class_and_image_are_looked_at():
    boxes = np.array([[0.0, 0, 50, 50]] * 100 + [[60, 60, 99, 99]])
    found = {"boxes": boxes, "labels": np.ones(101, int), "scores": np.linspace(1, 0.1, 101)}
    truth = {"boxes": boxes[-1:], "labels": np.ones(1, int), "difficult": np.zeros(1, bool)}
    assert coco_ap([found], [truth], 1)["ap"] == 0.0
    less = {key: value[1:] for key, value in found.items()}
    assert coco_ap([less], [truth], 1)["ap"] == pytest.approx(0.01)


def test_lists_of_unequal_length_are_refused(scene):
    with pytest.raises(ValueError, match="detections: must have an entry an image, got 40 for 39 images"):
        coco_ap(scene[0], scene[1][:-1], NUM_CLASSES)
    with pytest.raises(ValueError, match="image_ids: must have an entry an image, got 1 for 40 images"):
        to_coco_results(scene[0], ["000001"])


def test_results_have_cocos_format_and_survive_json():
    found = {
        "boxes": np.array([[1.256, 2, 4.5, 8]], np.float32),
        "labels": np.array([2]),
        "scores": np.array([0.1234567]),
    }
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    expected = {"image_id": "b", "category_id": 2, "bbox": [1.26, 2.0, 3.24, 6.0], "score": 0.12346}
    assert json.loads(json.dumps(to_coco_results([empty, found], ["a", "b"]))) == [expected]
    assert to_coco_results([found], [7], category_ids=[1, 18]) == [
        expected | {"image_id": 7, "category_id": 18}
    ]
    with pytest.raises(ValueError, match=r"detections\[0\]: labels must lie in 1..1, got 2"):
        to_coco_results([found], [7], category_ids=[1])


def test_results_are_rounded_as_python_rounds():
    """Halves above all: 2.675 is a little less than it says, 0.125 is one exactly and goes to the even."""
    rng = np.random.default_rng(0)
    halves = rng.integers(-(10**6), 10**6, (3000, 4)) * 10.0 ** rng.integers(-6, 0, (3000, 1))
    binary = rng.integers(-999, 999, (1000, 4)) / 2.0 ** rng.integers(1, 7, (1000, 1))
    boxes = np.concatenate(
        [halves, binary, rng.normal(0, 1, (1000, 4)) * 10.0 ** rng.integers(-9, 17, (1000, 1))]
    )
    boxes[:, 2:] += boxes[:, :2]
    scores = np.abs(boxes[:, 3]) + 0.000005
    found = {"boxes": boxes, "labels": np.ones(len(boxes), int), "scores": scores}
    for row, (x1, y1, x2, y2), score in zip(
        to_coco_results([found], [0]), boxes.tolist(), scores.tolist(), strict=True
    ):
        assert row["bbox"] == [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        assert row["score"] == round(score, 5)


def test_rounded_results_have_almost_the_same_ap(scene):
    detections, ground_truth = scene
    rows = to_coco_results(detections, range(len(detections)))
    again = []
    for image in range(len(detections)):
        mine = [row for row in rows if row["image_id"] == image]
        xywh = np.array([row["bbox"] for row in mine]).reshape(-1, 4)
        again.append(
            {
                "boxes": np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
                "labels": np.array([row["category_id"] for row in mine], int),
                "scores": np.array([row["score"] for row in mine]),
            }
        )
    expected = coco_ap(detections, ground_truth, NUM_CLASSES)["ap"]
    assert coco_ap(again, ground_truth, NUM_CLASSES)["ap"] == pytest.approx(expected, abs=0.005)
