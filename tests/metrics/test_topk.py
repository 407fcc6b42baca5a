"""Top-k accuracy against sorting by hand; ties, nan and corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.metrics.topk import top_k


def by_hand(scores: Tensor, labels: Tensor, k: int) -> float:
    """Sort each image's classes from the best score on, the label behind its equals, and look for it."""
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c == label))
        right += label in order[:k]
    return right / len(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("classes", [1, 2, 7, 40])
def test_it_is_the_share_found_by_sorting_also_with_many_ties(classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(classes)
    for spread in (1, 3, 1000):  # few different values are many ties
        scores = torch.randint(-spread, spread + 1, (60, classes), generator=generator).to(dtype)
        labels = torch.randint(classes, (60,), generator=generator)
        ks = (1, 2, 5, 100)
        assert top_k(scores, labels, ks) == {f"top{k}": by_hand(scores, labels, k) for k in ks}


def test_a_label_stands_behind_equal_scores_wherever_it_is() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert top_k(scores, [0, 1], (1, 2)) == {"top1": 0.0, "top2": 1.0}
    assert top_k(torch.zeros(4, 10), torch.arange(4)) == {"top1": 0.0, "top5": 0.0}
    assert top_k(torch.tensor([[0.0, -0.0]]), [0], [1]) == {"top1": 0.0}


def test_arrays_and_tensors_of_any_strides_count_alike_and_stay_as_they_are() -> None:
    scores = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 9
    before = scores.clone()
    expected = top_k(scores.T.contiguous(), labels)
    assert top_k(scores.T, labels) == top_k(scores.T.numpy(), labels.numpy().astype(np.uint8)) == expected
    assert torch.equal(scores, before)
    assert all(type(value) is float for value in expected.values())


def test_from_as_many_as_there_are_classes_every_image_is_right() -> None:
    assert top_k(torch.randn(5, 3), [0, 1, 2, 0, 1], (3, 5)) == {"top3": 1.0, "top5": 1.0}


def test_infinite_scores_are_ranked() -> None:
    scores = torch.tensor([[math.inf, 0.0, -math.inf]] * 3)
    assert top_k(scores, [0, 1, 2], (1, 2)) == {"top1": pytest.approx(1 / 3), "top2": pytest.approx(2 / 3)}


@pytest.mark.parametrize("labels", [[], np.zeros(0, np.int64)])
def test_no_images_give_nan(labels: list | np.ndarray) -> None:
    result = top_k(np.zeros((0, 10), np.float32), labels)
    assert list(result) == ["top1", "top5"]
    assert all(math.isnan(value) for value in result.values())


def test_nan_is_refused_with_the_number_of_images_wherever_it_stands() -> None:
    scores = torch.zeros(4, 3)
    scores[1, 2] = scores[3, 0] = scores[3, 1] = math.nan
    with pytest.raises(NumericsError, match=r"^scores must be numbers, got nan for 2 of 4 images$"):
        top_k(scores, [0, 0, 0, 2])


@pytest.mark.parametrize(
    "scores, labels, ks, message",
    [
        (np.zeros((2, 3)), [0, 3], (1,), r"labels must lie in 0\.\.2, got 3"),
        (np.zeros((2, 3)), [-1, 0], (1,), r"labels must lie in 0\.\.2, got -1"),
        (
            np.zeros((2, 3)),
            [0],
            (1,),
            r"\[N, C\] and whole numbers \[N\], got \[2, 3\] and torch.int64 \[1\]",
        ),
        (np.zeros(3), [0, 1, 2], (1,), r"got \[3\] and"),
        (np.zeros((2, 3)), [0.0, 1.0], (1,), "got .* and torch.float32"),
        (np.zeros((2, 3)), [[0], [1]], (1,), r"got .* and torch.int64 \[2, 1\]"),
        (np.zeros((2, 3)), [0, 1], (1, 0), r"each must be at least 1, got \[1, 0\]"),
    ],
)
def test_what_does_not_fit_is_refused(scores, labels, ks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(scores, labels, ks)
