"""Pairs of detections of two models on one image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbdet.metrics import diff_detections

A, B, C = [0, 0, 10, 10], [20, 20, 40, 40], [60, 0, 90, 30]


def found(boxes=(), scores=None, labels=None):
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array([1] * len(boxes) if labels is None else labels, np.int64),
        "scores": np.array([0.9] * len(boxes) if scores is None else scores, np.float32),
    }


def as_lists(diff):
    return diff.kept.tolist(), diff.lost.tolist(), diff.new.tolist()


def test_detections_are_kept_lost_or_new():
    assert as_lists(diff_detections(found([A, B]), found([C, A]))) == ([[0, 1]], [1], [0])


def test_a_change_of_class_is_one_lost_and_one_new():
    assert as_lists(diff_detections(found([A]), found([A], labels=[2]))) == ([], [0], [0])


def test_pairs_are_one_to_one_and_the_best_score_chooses_first():
    near = [0, 0, 10, 9]
    assert as_lists(diff_detections(found([near, A], [0.2, 0.9]), found([A]))) == ([[1, 0]], [0], [])
    assert as_lists(diff_detections(found([near, A], [0.9, 0.2]), found([A]))) == ([[0, 0]], [1], [])
    assert as_lists(diff_detections(found([A]), found([near, A]))) == ([[0, 1]], [], [0])
    assert as_lists(diff_detections(found([A, A]), found([A, near]))) == ([[0, 0], [1, 1]], [], [])


def test_the_least_overlap_of_a_pair_counts_when_reached_exactly():
    half = found([[0, 0, 10, 5]])
    assert as_lists(diff_detections(found([A]), half)) == ([[0, 0]], [], [])
    assert as_lists(diff_detections(found([A]), half, iou=0.51)) == ([], [0], [0])


def test_empty_sides_are_legal_and_indices_have_their_shapes():
    both = diff_detections(found(), found())
    assert (both.kept.shape, both.lost.shape, both.new.shape) == ((0, 2), (0,), (0,))
    assert as_lists(diff_detections(found([A, B]), found())) == ([], [0, 1], [])
    assert as_lists(diff_detections(found(), found([A, B]))) == ([], [], [0, 1])
    assert all(indices.dtype == np.int64 for indices in (both.kept, both.lost, both.new))


def test_tensors_are_accepted_and_stay_as_they_are():
    tensors = {key: torch.from_numpy(value) for key, value in found([A, B]).items()}
    assert as_lists(diff_detections(tensors, tensors)) == ([[0, 0], [1, 1]], [], [])
    assert tensors["boxes"].tolist() == [A, B]


def test_an_impossible_overlap_is_refused():
    with pytest.raises(ValueError, match=r"iou: must lie in \(0, 1\], got 0"):
        diff_detections(found(), found(), iou=0)


sides = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 4)),
    max_size=7,
).map(
    lambda rows: found(
        [[x, y, x + d, y + d] for x, y, d, _, _ in rows], [r[4] / 4 for r in rows], [r[3] for r in rows]
    )
)


@given(sides, sides)
def test_every_detection_is_in_exactly_one_place(reference, other):
    diff = diff_detections(reference, other)
    assert sorted([*diff.kept[:, 0], *diff.lost]) == list(range(len(reference["boxes"])))
    assert sorted([*diff.kept[:, 1], *diff.new]) == list(range(len(other["boxes"])))
    assert all(reference["labels"][i] == other["labels"][j] for i, j in diff.kept)


@given(sides)
def test_a_model_keeps_everything_of_itself(reference):
    assert len(diff_detections(reference, reference).kept) == len(reference["boxes"])
