"""What the engine loses against torch is told as it is, and what torch loses against itself beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from deploy.detectors import CLASSES, scenes, tiny_classifier
from deploy.toys import images, quantized
from torch import Tensor, nn

from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.deploy.codes import torch_codes
from lbdet.deploy.parity import detection_differences, nudged, parity, raw_images
from lbdet.engine.evaluate import Detections
from lbdet.engine.task import ClassificationTask, DetectionTask


@pytest.fixture(scope="module")
def data(devkit):
    return read_voc(devkit, ["2012:val"], SHAPE_CLASSES)


def truth(data: Any) -> Detections:
    return [
        {"boxes": r.boxes, "labels": r.labels, "scores": np.full(len(r.labels), 0.9, np.float32)}
        for r in data.records
    ]


class Knowing(nn.Module):
    """Finds what it was told, image by image; in its second pass only every second time, where asked."""

    def __init__(self, answers: Detections, sensitive: bool = False) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.answers, self.sensitive, self.calls = answers, sensitive, 0

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        answer = self.answers[self.calls % len(self.answers)]
        again = self.calls >= len(self.answers)
        self.calls += 1
        keep = 0 if self.sensitive and again and self.calls % 2 else len(answer["labels"])
        assert len(images) == 1
        return [{key: torch.from_numpy(value[:keep]) for key, value in answer.items()}]


class Answering:
    """An engine that finds what it was told."""

    name, facts = "oracle 1", {"int8_layers": []}

    def __init__(self, answers: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.answers = list(answers)

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        return dict(self.answers.pop(0))

    def int8_layers(self) -> set[str]:
        return set()


def without(answers: Detections, every: int) -> Detections:
    return [{k: v[: 0 if i % every == 0 else None] for k, v in a.items()} for i, a in enumerate(answers)]


def test_an_engine_that_finds_the_same_loses_nothing(data):
    found = parity(Knowing(truth(data)), Answering(truth(data)), DetectionTask(), data)
    assert found["images"] == len(data)
    assert list(found["means"]["torch"]) == ["voc07_map", "voc_area_map", "coco_map"]
    assert found["means"]["torch"] == found["means"]["engine"] == found["means"]["noise"]
    assert found["means"]["torch"]["voc07_map"] == pytest.approx(1)
    assert (found["drop"], found["noise_drop"]) == (0, 0)
    objects = sum(len(a["labels"]) for a in truth(data))
    for kind in ("engine", "noise"):
        assert [found["differences"][kind][key] for key in ("kept", "lost", "new")] == [objects, 0, 0]
        assert found["differences"][kind]["least_overlap"] == pytest.approx(1)


def test_what_an_engine_misses_is_its_drop(data):
    found = parity(Knowing(truth(data)), Answering(without(truth(data), 2)), DetectionTask(), data)
    means = found["means"]
    assert found["drop"] == means["torch"]["voc07_map"] - means["engine"]["voc07_map"] > 0.2
    assert found["noise_drop"] == 0
    assert found["differences"]["engine"]["lost"] > 0
    assert found["differences"]["noise"]["lost"] == 0


def test_noise_is_told_and_taken_off_nothing(data):
    model = Knowing(truth(data), sensitive=True)
    found = parity(model, Answering(without(truth(data), 2)), DetectionTask(), data)
    assert found["noise_drop"] > 0.2
    assert found["drop"] == found["means"]["torch"]["voc07_map"] - found["means"]["engine"]["voc07_map"] > 0.2


def test_the_mean_is_over_the_classes_that_are_scored(data):
    only = [{k: v[a["labels"] == 1] for k, v in a.items()} for a in truth(data)]
    task = DetectionTask(SHAPE_CLASSES[:1])
    assert parity(Knowing(truth(data)), Answering(only), task, data)["drop"] == 0


def test_without_an_object_of_a_scored_class_the_drop_is_not_known(data):
    empty = DetectionData(
        ("none", *data.classes), tuple(replace(r, labels=r.labels + 1) for r in data.records)
    )
    answers = truth(empty)
    found = parity(Knowing(answers), Answering(answers), DetectionTask(("none",)), empty)
    assert (found["means"]["engine"]["voc07_map"], found["drop"], found["noise_drop"]) == (None, None, None)


def test_detections_are_compared_one_by_one_above_a_score():
    def found(*rows: tuple[float, int, float]) -> dict[str, np.ndarray]:
        boxes = np.array([[x, 0, x + 10, 10] for x, _, _ in rows], np.float32).reshape(-1, 4)
        labels, scores = (
            np.array([k for _, k, _ in rows], np.int64),
            np.array([s for *_, s in rows], np.float32),
        )
        return {"boxes": boxes, "labels": labels, "scores": scores}

    ours = [found((0, 1, 0.9), (50, 2, 0.8), (90, 1, 0.2)), found((0, 1, 0.5))]
    theirs = [found((1, 1, 0.7), (50, 1, 0.8), (70, 1, 0.29)), found((0, 1, 0.4))]
    differences = detection_differences(ours, theirs)
    assert {key: differences[key] for key in ("kept", "lost", "new")} == {"kept": 2, "lost": 1, "new": 1}
    assert differences["median_score_difference"] == pytest.approx(0.15)
    assert differences["largest_score_difference"] == pytest.approx(0.2)
    assert differences["least_overlap"] == pytest.approx(9 / 11)


def test_no_pairs_have_no_differences():
    empty = [{"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "scores": np.zeros(0)}]
    found = detection_differences(empty, empty)
    assert (found["kept"], found["median_score_difference"], found["least_overlap"]) == (0, None, None)


@pytest.fixture
def labelled() -> LabelledData:
    return LabelledData(CLASSES, np.array([0, 1, 2, 0]), np.stack(scenes(4, (32, 32))))


def test_a_classifier_is_compared_by_its_accuracy_and_scores(labelled):
    model, task = tiny_classifier(), ClassificationTask()
    with torch.no_grad():
        (batch,) = task.inputs(labelled, 4, torch.device("cpu"))
        scores = model(batch).softmax(-1).numpy()
    exact = parity(model, Answering([{"scores": row} for row in scores]), task, labelled)
    assert exact["drop"] == pytest.approx(0)
    assert exact["differences"]["engine"]["largest_score_difference"] < 1e-5
    right = np.eye(3, dtype=np.float32)[labelled.labels]
    better = parity(model, Answering([{"scores": row} for row in right]), task, labelled)
    assert better["means"]["engine"]["top1"] == 1
    assert better["drop"] == better["means"]["torch"]["top1"] - 1 <= 0
    assert better["differences"]["engine"]["largest_score_difference"] == pytest.approx(
        float(np.abs(right - scores).max()), abs=1e-5
    )


def test_images_reach_an_engine_as_they_are_stored(data, labelled):
    assert [image.shape for image in raw_images(data)] == [(r.height, r.width, 3) for r in data.records]
    for image, stored in zip(raw_images(labelled), scenes(4, (32, 32)), strict=True):
        assert np.array_equal(image, stored)
    assert [image.shape for image in raw_images(labelled, 20)] == [(20, 20, 3)] * 4


def test_nudged_layers_see_inputs_larger_by_a_millionth_and_only_inside():
    model, seen = quantized("W4A8"), []
    layer = model[3]
    with nudged(model):
        layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        layer(torch.full((1, 6, 4, 4), 3.0))
    layer(torch.full((1, 6, 4, 4), 3.0))
    assert [float(x.max()) for x in seen] == [float(torch.tensor(3.0) * (1 + 1e-6)), 3.0]
    assert float(seen[0].max()) > 3


def test_nudging_a_model_is_noise_in_its_codes():
    model = quantized("W4A8")
    x = images().repeat(64, 1, 1, 1) * torch.linspace(0.5, 1.5, 256).view(-1, 1, 1, 1)
    plain = torch_codes(model, x)
    with nudged(model):
        noisy = torch_codes(model, x)
    changed = sum((plain[name] != noisy[name]).sum() for name in plain)
    assert 0 < changed < 0.01 * sum(codes.size for codes in plain.values())
