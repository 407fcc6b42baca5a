"""VOC average precision: against plain loops, against hand-made cases, and against published numbers."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_ap import inclusive, overlap, voc_ap_by_loops

from lbdet.classes import VOC20
from lbdet.metrics import voc, voc_ap
from lbdet.metrics.voc import average_precision, match, precision_recall

ORACLE = Path("datasets/voc2007_eval_oracle")
OBJECT = [0, 0, 10, 10]


def found(boxes=(), scores=(), labels=None):
    labels = [1] * len(boxes) if labels is None else labels
    return _sample(boxes, labels) | {"scores": np.array(scores, np.float32)}


def truth(boxes=(), labels=None, difficult=None):
    labels = [1] * len(boxes) if labels is None else labels
    return _sample(boxes, labels) | {"difficult": np.array(difficult or [False] * len(boxes), bool)}


def _sample(boxes, labels):
    return {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(labels, np.int64)}


def ap(detections, ground_truth, metric="area", num_classes=1):
    return voc_ap(detections, ground_truth, num_classes, metric).tolist()


@st.composite
def scenes(draw):
    """One to four images of boxes on a coarse grid: overlaps of exactly .5 and equal scores are common."""
    side = st.integers(1, 4)
    box = st.tuples(st.integers(0, 3), st.integers(0, 3), side, side).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    )
    label = st.integers(1, 2)
    score = st.sampled_from([0.1, 0.5, 0.9])
    detections, ground_truth = [], []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.lists(st.tuples(box, score, label), max_size=6))
        detections.append(found([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
        rows = draw(st.lists(st.tuples(box, label, st.booleans()), max_size=4))
        ground_truth.append(truth([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
    return detections, ground_truth


@settings(max_examples=300, deadline=None)
@given(scenes(), st.sampled_from(["voc07", "area"]), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_ap_equals_that_of_plain_loops(scene, metric, iou):
    actual = voc_ap(*scene, 3, metric, iou)
    np.testing.assert_allclose(actual, voc_ap_by_loops(*scene, 3, metric, iou), atol=1e-12)


@pytest.mark.parametrize("metric", ["voc07", "area"])
def test_large_random_scenes_equal_those_of_plain_loops(metric):
    rng = np.random.default_rng(0)
    detections, ground_truth = [], []
    for _ in range(60):
        n, m = rng.integers(0, 40), rng.integers(0, 8)
        corner, size = rng.uniform(0, 30, (n + m, 2)), rng.uniform(10, 40, (n + m, 2))
        boxes, labels = np.concatenate([corner, corner + size], axis=1), rng.integers(1, 3, n + m)
        detections.append(found(boxes[:n], rng.random(n), labels[:n]))
        ground_truth.append(truth(boxes[n:], labels[n:], list(rng.random(m) < 0.2)))
    actual = voc_ap(detections, ground_truth, 2, metric, iou=0.3)
    assert actual.min() > 0.02  # the scenes are not so hard that zero would agree
    np.testing.assert_allclose(actual, voc_ap_by_loops(detections, ground_truth, 2, metric, 0.3), atol=1e-12)


def decisions_by_loops(detections, ground_truth, c, iou):
    """Return whether each detection of class c that counts is true, best score first, one at a time."""
    rows = [
        (-score, image, box)
        for image, sample in enumerate(detections)
        for box, label, score in zip(*(sample[k] for k in ("boxes", "labels", "scores")), strict=True)
        if label == c
    ]
    taken, decisions = set(), []
    for _, image, box in sorted(rows, key=lambda row: row[0]):
        objects = ground_truth[image]
        overlaps = [
            overlap(inclusive(box), inclusive(other)) if label == c else -1
            for other, label in zip(objects["boxes"], objects["labels"], strict=True)
        ]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if not overlaps or overlaps[best] < iou:
            decisions.append(False)
        elif not objects["difficult"][best]:
            decisions.append((image, best) not in taken)
            taken.add((image, best))
    return decisions


def grid_scene(seed):
    """Draw a few images on a coarse grid with three scores: ties are usual, empty images and classes too."""
    rng = np.random.default_rng(seed)
    detections, ground_truth = [], []
    for _ in range(rng.integers(1, 5)):
        n, m = rng.integers(0, 25), rng.integers(0, 10)
        corner, size = rng.integers(0, 3, (n + m, 2)), rng.integers(2, 4, (n + m, 2))
        boxes, labels = np.concatenate([corner, corner + size], axis=1), rng.integers(1, 5, n + m)
        detections.append(found(boxes[:n], rng.integers(0, 3, n) / 2, labels[:n]))
        ground_truth.append(truth(boxes[n:], labels[n:], list(rng.random(m) < 0.3)))
    return detections, ground_truth


@pytest.mark.parametrize("pairs", [1, 7, 1 << 16])
def test_every_decision_is_that_of_plain_loops_however_many_pairs_are_compared_at_once(monkeypatch, pairs):
    monkeypatch.setattr(voc, "_PAIRS", pairs)
    true = ignored = 0
    for detections, ground_truth in map(grid_scene, range(80)):
        for c, mine in enumerate(match(detections, ground_truth, 5, 0.5), start=1):
            assert mine.true_positive.tolist() == decisions_by_loops(detections, ground_truth, c, 0.5)
            difficult = np.concatenate([g["difficult"][g["labels"] == c] for g in ground_truth])
            assert mine.num_objects == np.count_nonzero(~difficult)
            true += mine.true_positive.sum()
            ignored += sum((d["labels"] == c).sum() for d in detections) - len(mine.true_positive)
    assert min(true, ignored) > 100  # neither is rare


def test_memory_does_not_grow_with_the_pairs_of_a_crowded_image():
    boxes = np.tile(OBJECT, (3000, 1)) + np.arange(3000)[:, None] % 50
    scene = [found(boxes, np.linspace(0, 1, 3000))], [truth(boxes[:1000])]
    tracemalloc.start()
    match(*scene, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # three million pairs of a detection with an object; their overlaps alone have 24 MB


def test_difficult_objects_are_neither_found_nor_missed():
    objects = [truth([OBJECT, [20, 20, 30, 30]], difficult=[False, True])]
    assert ap([found([[20, 20, 30, 30], OBJECT], [0.9, 0.8])], objects) == [1.0]
    assert ap([found([OBJECT], [0.8])], objects) == [1.0]


def test_a_second_detection_of_an_object_is_a_false_positive():
    objects = [truth([OBJECT, [20, 20, 30, 30]])]
    detections = [found([OBJECT, OBJECT, [20, 20, 30, 30]], [0.9, 0.8, 0.7])]
    assert ap(detections, objects) == [pytest.approx((1 + 2 / 3) / 2)]
    assert ap(detections, objects, "voc07") == [pytest.approx((6 * 1 + 5 * 2 / 3) / 11)]


def test_a_detection_has_no_second_choice_of_an_object():
    """The best object is taken already; the devkit does not try the other one, which overlaps enough too."""
    objects = [truth([[0, 0, 10, 10], [0, 0, 10, 8]])]
    detections = [found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8])]
    assert ap(detections, objects) == [0.5]


def test_an_overlap_of_exactly_the_threshold_counts():
    assert ap([found([[0, 0, 10, 5]], [0.9])], [truth([OBJECT])]) == [1.0]
    assert ap([found([[0, 0, 10, 4.99]], [0.9])], [truth([OBJECT])]) == [0.0]


def test_equal_scores_keep_the_order_of_the_input():
    right, wrong = OBJECT, [50, 50, 60, 60]
    assert ap([found([right, wrong], [0.5, 0.5])], [truth([OBJECT])]) == [1.0]
    assert ap([found([wrong, right], [0.5, 0.5])], [truth([OBJECT])]) == [0.5]


def test_a_class_without_objects_to_find_has_no_ap():
    result = voc_ap(
        [found([OBJECT, OBJECT], [0.9, 0.9], [1, 2])], [truth([OBJECT, OBJECT], [2, 3], [True, False])], 3
    )
    np.testing.assert_array_equal(result, [np.nan, np.nan, 0.0])


def test_no_images_and_no_detections_are_legal():
    assert np.isnan(voc_ap([], [], 2)).all()
    assert ap([found()], [truth([OBJECT])]) == [0.0]
    assert np.isnan(ap([found()], [truth()])).all()


def test_a_box_is_matched_only_in_its_own_image():
    assert ap([found([OBJECT], [0.9]), found()], [truth(), truth([OBJECT])]) == [0.0]


def test_tensors_give_the_same_as_arrays_and_stay_as_they_are():
    detections, objects = [found([OBJECT, [0, 0, 9, 9]], [0.3, 0.9])], [truth([OBJECT])]
    tensors = [{key: torch.from_numpy(value.copy()) for key, value in detections[0].items()}]
    assert ap(tensors, objects) == ap(detections, objects) == [1.0]
    assert all(np.array_equal(tensors[0][key], detections[0][key]) for key in detections[0])


def test_one_matching_gives_both_metrics_and_the_curve():
    detections = [found([[50, 50, 60, 60], OBJECT, [20, 20, 30, 30]], [0.9, 0.8, 0.7])]
    (matches,) = match(detections, [truth([OBJECT, [20, 20, 30, 30]])], 1)
    precision, recall = precision_recall(matches)
    assert (precision.tolist(), recall.tolist()) == ([0, 1 / 2, 2 / 3], [0, 1 / 2, 1])
    assert average_precision(matches, "area") == pytest.approx(2 / 3)
    assert average_precision(matches, "voc07") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("detections", "objects", "message"),
    [
        ([found()], [], "detections: must have an entry an image, got 1 for 0 images"),
        ([found([OBJECT], [0.9], [2])], [truth()], r"detections\[0\]: labels must lie in 1..1, got 2"),
        (
            [found()] * 2,
            [truth(), truth([OBJECT], [0])],
            r"ground_truth\[1\]: labels must lie in 1..1, got 0",
        ),
        (
            [found([OBJECT], [0.9, 0.8])],
            [truth()],
            r"detections\[0\]: boxes, labels and scores must be .* and \(2,\)",
        ),
        ([found([OBJECT], [np.nan])], [truth()], r"detections\[0\]: scores must be finite, got nan"),
        (
            [found([[0, 0, np.inf, 1]], [0.9])],
            [truth()],
            r"detections\[0\]: boxes must be finite, got \[0.0, 0.0, inf",
        ),
    ],
)
def test_what_does_not_fit_is_refused(detections, objects, message):
    with pytest.raises(ValueError, match=message):
        voc_ap(detections, objects, 1)


def test_an_unknown_metric_and_an_impossible_overlap_are_refused():
    with pytest.raises(ValueError, match="metric: must be 'voc07' or 'area', got 'coco'"):
        voc_ap([], [], 1, "coco")
    with pytest.raises(ValueError, match=r"iou: must lie in \(0, 1\], got 50"):
        voc_ap([], [], 1, iou=50)


@pytest.mark.skipif(not ORACLE.is_dir(), reason="datasets/voc2007_eval_oracle is absent: see `make data`")
def test_a_real_detector_on_voc2007_test_has_its_published_ap():
    (folder,) = (ORACLE / "detections").iterdir()
    detections, ground_truth = _read_oracle(folder)
    start = time.perf_counter()
    actual = voc_ap(detections, ground_truth, len(VOC20))
    assert time.perf_counter() - start < 10  # about .3 s on an idle core for 254 590 detections
    published = json.loads((folder / "published_ap07.json").read_text())["per_class"]
    np.testing.assert_allclose(actual, [published[name] for name in VOC20], atol=1e-4)


def _read_oracle(folder):
    """VOC coordinates, 1-based and inclusive, become half-open boxes by moving x1 and y1 down by one."""
    objects = json.loads(gzip.decompress((ORACLE / "gt_voc2007_test.json.gz").read_bytes()))
    rows = {image: [] for image in objects}
    for label, name in enumerate(VOC20, start=1):
        for line in gzip.decompress((folder / f"{name}.txt.gz").read_bytes()).decode().splitlines():
            image, *values = line.split()
            rows[image].append([label, *map(float, values)])
    shift = np.array([1, 1, 0, 0])
    detections, ground_truth = [], []
    for image, mine in objects.items():
        table = np.array(rows[image]).reshape(-1, 6)
        detections.append(
            {"boxes": table[:, 2:] - shift, "labels": table[:, 0].astype(int), "scores": table[:, 1]}
        )
        labels, boxes = (
            [VOC20.index(row[0]) + 1 for row in mine],
            np.array([row[1:5] for row in mine]) - shift,
        )
        ground_truth.append(truth(boxes, labels, [row[5] for row in mine]))
    return detections, ground_truth
