"""What a run was made with: names that stay, and a fingerprint that changes with the annotations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine.manifest import fingerprint, manifest, other_data


def test_the_fingerprint_is_that_of_names_and_annotations(devkit):
    data = read_voc(devkit, ["2012:val"], SHAPE_CLASSES)
    same = read_voc(devkit, ["2012:val"], SHAPE_CLASSES)
    assert fingerprint(data) == fingerprint(same)
    assert other_data(fingerprint(data), same) == ""
    first = data.records[0]
    moved, relabelled = first.boxes.copy(), first.labels.copy()
    moved[0, 0] += 1
    relabelled[0] = 1 + relabelled[0] % len(SHAPE_CLASSES)
    for record in (
        replace(first, boxes=moved),
        replace(first, labels=relabelled),
        replace(first, difficult=~first.difficult),
        replace(first, id="other"),
    ):
        changed = replace(data, records=(record, *data.records[1:]))
        assert "the data differ from those of the run: 6 images" in other_data(fingerprint(data), changed)
    for changed in (
        data.take([0, 1]),
        data.take([1, 0, 2, 3, 4, 5]),
        replace(data, classes=data.classes[::-1]),
    ):
        assert other_data(fingerprint(data), changed)


def test_boxes_that_move_from_one_image_to_the_next_change_it(devkit):
    record = read_voc(devkit, ["2012:val"], SHAPE_CLASSES).records[0]
    none = replace(record, boxes=record.boxes[:0], labels=record.labels[:0], difficult=record.difficult[:0])
    one, other = DetectionData(("a",), (record, none)), DetectionData(("a",), (none, record))
    assert fingerprint(one) != fingerprint(other)


def test_labels_make_the_fingerprint_of_a_classification_set():
    images = np.zeros((3, 2, 2, 3), np.uint8)
    sets = [
        LabelledData(("a", "b"), np.array(labels), images) for labels in ([0, 1, 0], [0, 1, 0], [1, 0, 0])
    ]
    assert fingerprint(sets[0]) == fingerprint(sets[1]) != fingerprint(sets[2])


def test_the_manifest_names_versions_machine_and_data(devkit):
    data = read_voc(devkit, ["2012:val"], SHAPE_CLASSES)
    found = manifest("seed: 3", 3, data, data)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["seed"] == 3
    assert found["data"] == {"train": fingerprint(data), "val": fingerprint(data)}
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["config"] != manifest("seed: 4", 4, data, data)["config"]
