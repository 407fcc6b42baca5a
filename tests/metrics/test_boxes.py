"""Intersection over union, and the table of all images' boxes."""

from __future__ import annotations

import numpy as np
from oracles_ap import inclusive, overlap

from lbdet.metrics.boxes import box_iou, stack


def test_the_overlap_is_the_devkits_on_inclusive_pixels():
    rng = np.random.default_rng(0)
    corner, size = rng.integers(0, 20, (40, 2)), rng.integers(1, 20, (40, 2))
    boxes = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    expected = [[overlap(inclusive(a), inclusive(b)) for b in boxes] for a in boxes]
    np.testing.assert_allclose(box_iou(boxes[:, None], boxes[None]), expected, rtol=1e-15)


def test_empty_and_inverted_boxes_overlap_nothing():
    boxes = np.array([[0, 0, 9, 9], [3, 3, 3, 3], [5, 5, 2, 2], [9, 9, 1, 1]])
    assert box_iou(boxes[:, None], boxes[None]).tolist() == np.diag([1.0, 0, 0, 0]).tolist()


def test_images_are_stacked_in_their_order():
    samples = [
        {"boxes": np.zeros((n, 4)), "labels": np.full(n, n), "scores": np.full(n, n / 4)} for n in (1, 0, 2)
    ]
    table = stack(samples, "scores", 2, "detections")
    assert table.image.tolist() == [0, 2, 2]
    assert table.labels.tolist() == [1, 2, 2]
    assert table.extra.tolist() == [0.25, 0.5, 0.5]


def test_a_table_falls_apart_into_one_of_each_class_in_the_same_order():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([1, 2, 4], 5))  # no 3, and no 5
    sample = {"boxes": rng.random((15, 4)), "labels": labels, "scores": rng.random(15)}
    tables = list(stack([sample, sample], "scores", 5, "detections").by_class(5))
    assert [len(table.labels) for table in tables] == [10, 10, 0, 10, 0]
    for c, table in enumerate(tables, start=1):
        assert table.image.tolist() == [0] * (len(table.image) // 2) + [1] * (len(table.image) // 2)
        assert (table.labels == c).all()
        np.testing.assert_array_equal(table.boxes, np.tile(sample["boxes"][labels == c], (2, 1)))
        np.testing.assert_array_equal(table.extra, np.tile(sample["scores"][labels == c], 2))
