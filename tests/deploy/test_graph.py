"""One graph from an image to detections finds what torchvision's detector finds."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from deploy.detectors import (
    SIZES,
    as_input,
    assert_same_detections,
    in_torch,
    quantized_detector,
    scenes,
    tiny_classifier,
    tiny_faster_rcnn,
)  # fmt: skip
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from lbdet.deploy.graph import ClassifierGraph, FasterRcnnGraph, detection_graph
from lbdet.deploy.lower import lower
from lbdet.deploy.onnx_ops import non_max_suppression

KEYS = ("boxes", "labels", "scores")
slow_ssdlite = pytest.param("ssdlite", marks=pytest.mark.slow)


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Return a detector with quantized weights and float inputs, so that no code can flip, and its graph."""
    model = quantized_detector(name, "W4")
    return model, detection_graph(lower(model))


@torch.no_grad()
def through(graph: nn.Module, image: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(KEYS, (value.numpy() for value in graph(torch.from_numpy(image))), strict=True))


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 1])
@pytest.mark.parametrize("name", ["ssd_tiny", "faster_rcnn", slow_ssdlite])
def test_the_graph_finds_what_the_detector_finds(name, size):
    model, graph = pair(name)
    for image in scenes(2, size):
        expected = in_torch(model, image)
        assert len(expected["scores"]) > 5
        assert_same_detections(through(graph, image), expected)


@pytest.mark.parametrize("name", ["ssd_tiny", "faster_rcnn"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2000, 1), (1, 5000)])
def test_images_of_a_pixel_or_a_line_give_detections_inside_them(name, size):
    found = through(pair(name)[1], scenes(1, size)[0])
    height, width = size
    assert bool(np.isfinite(found["scores"]).all())
    assert bool((found["boxes"] >= 0).all())
    assert bool((found["boxes"] <= [width, height, width, height]).all())


@pytest.mark.parametrize("name", ["ssd_tiny", "faster_rcnn"])
def test_no_detection_gives_empty_arrays_of_the_right_types(name):
    model = quantized_detector(name, "W4")
    (model.roi_heads if isinstance(model, FasterRCNN) else model).score_thresh = 2.0
    image = scenes(1)[0]
    found = through(detection_graph(lower(model)), image)
    assert found["boxes"].shape == (0, 4)
    assert_same_detections(found, in_torch(model, image))


def test_a_classifier_gives_the_scores_of_its_normalized_image():
    model = tiny_classifier()
    image = torch.from_numpy(scenes(1, (32, 32))[0])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    with torch.no_grad():
        found = ClassifierGraph(model, mean, std)(image)
        x = (image.permute(2, 0, 1) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1
        )
        torch.testing.assert_close(found, model(x[None]).softmax(-1)[0])
    assert found.shape == (3,)


def test_faster_rcnn_resizes_as_torchvision_does_or_to_a_pixel_more():
    model = tiny_faster_rcnn()
    assert isinstance(model, FasterRCNN)
    sizes = [(height, width) for height in range(40, 300, 17) for width in range(41, 300, 23)]
    differ = 0
    for height, width in sizes:
        image = torch.zeros(height, width, 3, dtype=torch.uint8)
        ours = [int(side) for side in FasterRcnnGraph(model)._size(image)]
        (theirs,) = model.transform([as_input(image.numpy())])[0].image_sizes
        assert {a - b for a, b in zip(ours, theirs, strict=True)} <= {0, 1}
        differ += tuple(ours) != theirs
    assert differ < 0.06 * len(sizes)


def suppressed_by_loops(
    boxes: Tensor, scores: Tensor, keep: int, iou: float, least: float
) -> list[list[int]]:
    kept = []
    for row in range(len(scores)):
        chosen: list[int] = []
        for column in sorted(range(scores.shape[1]), key=lambda k: -float(scores[row, k])):
            free = all(overlap(boxes[row, column], boxes[row, other]) <= iou for other in chosen)
            if free and float(scores[row, column]) > least and len(chosen) < keep:
                chosen.append(column)
        kept += [[row, column] for column in chosen]
    return kept


def overlap(a: Tensor, b: Tensor) -> float:
    sides = torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])
    both = float(sides.clamp(min=0).prod())
    return both / (float((a[2:] - a[:2]).prod()) + float((b[2:] - b[:2]).prod()) - both)


@pytest.mark.parametrize("keep", [1, 3, 50])
@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
def test_suppression_is_that_of_plain_loops(keep, least):
    g = torch.Generator().manual_seed(keep)
    corner = torch.rand(4, 20, 2, generator=g) * 10
    boxes = torch.cat([corner, corner + 1 + torch.rand(4, 20, 2, generator=g) * 5], -1)
    scores = torch.rand(4, 20, generator=g)
    scores[2] = 0.0  # a row of which nothing is left
    found = non_max_suppression(boxes, scores, keep, 0.3, least)
    assert found.tolist() == suppressed_by_loops(boxes, scores, keep, 0.3, least)
