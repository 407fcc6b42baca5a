"""Photographs of a report: which are chosen, how they are embedded, and what became of their boxes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sweeps import found_at, val_of

from lbdet.data.records import DetectionData, ImageRecord
from lbdet.errors import UserError
from lbdet.metrics import diff_detections
from lbdet.metrics.coco import to_coco_results
from lbdet.report.photos import Photo, choose_photos, compare, read_detections, read_photo

PHOTO = Photo("a", b"", 100, 80, (0.5, 0.25), "")


def record(name: str, objects: int, path: str = "") -> ImageRecord:
    return ImageRecord(name, path, 100, 80, np.zeros((objects, 4), np.float32), np.ones(objects, np.int64),
                       np.zeros(objects, bool))  # fmt: skip


def data_of(objects: list[int]) -> DetectionData:
    return DetectionData(("cat",), tuple(record(str(k), n) for k, n in enumerate(objects)))


def chosen(objects: list[int], count: int) -> list[int]:
    return [int(r.id) for r in choose_photos(data_of(objects), count).records]


def test_photographs_are_spread_over_those_with_objects() -> None:
    assert chosen([1] * 101, 5) == [0, 25, 50, 75, 100]
    assert chosen([0, 1] * 50, 3) == [1, 49, 99]


def test_photographs_without_objects_fill_up_what_is_missing_in_the_order_of_the_data() -> None:
    assert chosen([0, 0, 1, 0, 0, 2, 0], 4) == [0, 2, 5, 6]
    assert chosen([0, 1], 9) == [0, 1]
    assert chosen([], 3) == []


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 500), (480, 240)), ((300, 960), (150, 480)), ((96, 80), (96, 80))]
)
def test_a_photograph_is_at_most_480_pixels_long_and_never_enlarged(tmp_path, size, expected) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    photo = read_photo(record("x", 2, str(tmp_path / "x.png")), ("cat",))
    embedded = Image.open(io.BytesIO(photo.jpeg))
    assert (embedded.format, embedded.size) == ("JPEG", expected)
    assert (photo.width, photo.height) == expected
    assert photo.scale == (expected[0] / size[0], expected[1] / size[1])
    assert photo.objects == "2 cat"
    assert photo == read_photo(record("x", 2, str(tmp_path / "x.png")), ("cat",))


def test_an_image_that_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.jpg: image file does not exist"):
        read_photo(record("x", 1, str(tmp_path / "x.jpg")), ("cat",))
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff and no more")
    with pytest.raises(UserError, match=r"x.jpg: must be a whole JPEG or PNG image"):
        read_photo(record("x", 1, str(tmp_path / "x.jpg")), ("cat",))


def test_detections_are_read_back_above_the_threshold_in_their_order(tmp_path: Path, devkit: Path) -> None:
    data = val_of(devkit)
    ids, found = [r.id for r in data.records], found_at(data, "W2", 0)
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(to_coco_results(found, ids)))
    names = [ids[4], "not there", ids[1]]
    read = read_detections(path, names, len(data.classes), 0.6)
    assert len(read[1]["labels"]) == 0
    assert sum(len(one["labels"]) for one in read) > 0
    for got, want in zip((read[0], read[2]), (found[4], found[1]), strict=True):
        above = np.round(want["scores"], 5) >= 0.6
        assert got["labels"].tolist() == want["labels"][above].tolist()
        np.testing.assert_allclose(got["boxes"], want["boxes"][above], atol=0.011)
        np.testing.assert_allclose(got["scores"], want["scores"][above], atol=1e-5)


GOOD = {"image_id": "a", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    "change",
    [{"category_id": 3}, {"category_id": 0}, {"category_id": "x"}, {"category_id": None}, {"bbox": [1, 2, 3]},
     {"bbox": None}, {"bbox": [1, 2, 3, "x"]}, {"bbox": [1, 2, 3, None]}, {"score": "high"}, {"score": None}],
)  # fmt: skip
def test_an_entry_that_is_no_detection_is_told_with_its_number(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([GOOD, GOOD | change]))
    with pytest.raises(UserError, match=r"detections.json: entry 1: must have a category_id in 1..2, a "):
        read_detections(path, ["a"], 2, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "must be a list of detections "), ("[1]", "must be a list "), ("[{}]", "must be a list of "),
     ('[{"image_id', "must be JSON")],
)  # fmt: skip
def test_a_file_that_holds_no_detections_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(UserError, match=f"d.json: {message}"):
        read_detections(tmp_path / "d.json", ["a"], 2, 0.5)
    with pytest.raises(UserError, match=r"none.json: cannot be read, got No such file"):
        read_detections(tmp_path / "none.json", ["a"], 2, 0.5)


def test_boxes_are_counted_as_the_diff_counts_them_and_lie_in_pixels_of_the_picture(devkit: Path) -> None:
    data = val_of(devkit)
    total = np.zeros(3, int)
    for reference, found in zip(found_at(data, "float", 0), found_at(data, "W2", 0), strict=True):
        diff, rows = diff_detections(reference, found), compare(reference, found, PHOTO)
        statuses = [row[0] for row in rows]
        counts = [len(diff.kept), len(diff.lost), len(diff.new)]
        assert statuses == ["K"] * counts[0] + ["L"] * counts[1] + ["N"] * counts[2]
        total += counts
        sources = [(found, j) for _, j in diff.kept] + [(reference, i) for i in diff.lost]
        sources += [(found, j) for j in diff.new]
        for row, (source, i) in zip(rows, sources, strict=True):
            assert row[1] == source["labels"][i] - 1
            np.testing.assert_allclose(row[2:6], source["boxes"][i] * (0.5, 0.25, 0.5, 0.25), atol=0.051)
        for row, (i, j) in zip(rows, diff.kept, strict=False):
            assert row[6:] == pytest.approx((reference["scores"][i], found["scores"][j]), abs=6e-4)
    assert total.min() > 0


def test_a_lost_box_has_the_score_of_float_and_a_new_one_that_of_the_width() -> None:
    one = {"boxes": np.array([[0, 0, 10, 10.0]]), "labels": np.array([1]), "scores": np.array([0.9])}
    other = one | {"labels": np.array([2]), "scores": np.array([0.6])}
    photo = replace(PHOTO, scale=(1.0, 1.0))
    assert compare(one, other, photo) == [
        ("L", 0, 0, 0, 10, 10, 0.9, None),
        ("N", 1, 0, 0, 10, 10, None, 0.6),
    ]
    assert compare(one, one, photo) == [("K", 0, 0, 0, 10, 10, 0.9, 0.9)]


def test_without_a_reference_boxes_have_no_status(devkit: Path) -> None:
    (found, *_) = found_at(val_of(devkit), "W2", 0)
    rows = compare(None, found, PHOTO)
    assert len(rows) == len(found["labels"])
    assert {(row[0], row[6]) for row in rows} == {("-", None)}
