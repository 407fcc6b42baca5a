"""The COCO reader: what it makes of a correct file, and what it says about each mistake."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from lbdet.data.coco import read_coco, scan_coco
from lbdet.errors import UserError

GOOD = {
    "images": [
        {"id": 7, "file_name": "sub/b.jpg", "width": 100, "height": 80},
        {"id": 3, "file_name": "a.jpg", "width": 50, "height": 40},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [10, 20, 5.5, 6], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 100.4, 80], "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 0]},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
}


@pytest.fixture
def write(tmp_path):
    """Write images and the given content; return the two arguments of read_coco."""
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/a.jpg").write_bytes(b"")
    (tmp_path / "images/sub/b.jpg").write_bytes(b"")

    def writer(content: object) -> tuple[Path, Path]:
        (tmp_path / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "images", tmp_path / "x.json"

    return writer


def changed(part: str, number: int, **values) -> dict:
    content = copy.deepcopy(GOOD)
    content[part][number].update(values)
    return content


def problem(write, content: object, **options) -> str:
    images, path = write(content)
    with pytest.raises(UserError) as caught:
        read_coco(images, path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_boxes_labels_and_ids_come_in_the_files_order(write, capsys):
    data = read_coco(*write(GOOD))
    first, second = data.records
    assert data.classes == ("cat", "dog")
    assert (first.id, second.id) == ("7", "3")
    assert first.path.endswith("images/sub/b.jpg")
    np.testing.assert_array_equal(first.boxes, np.float32([[10, 20, 15.5, 26], [0, 0, 100, 80]]))
    assert first.labels.tolist() == [2, 1]
    assert (first.boxes.dtype, first.labels.dtype) == (np.float32, np.int64)
    assert capsys.readouterr().out == ""


def test_crowds_are_difficult_and_not_trained_on(write):
    data = read_coco(*write(GOOD))
    assert data.records[0].difficult.tolist() == [False, True]
    assert not data.train_on_difficult


def test_a_box_without_area_is_left_out_as_the_official_file_has_two(write):
    assert read_coco(*write(GOOD)).records[1].boxes.shape == (0, 4)


def test_classes_choose_the_labels_and_others_can_be_ignored(write):
    data = read_coco(*write(GOOD), classes=["dog"], other_classes="ignore")
    assert data.classes == ("dog",)
    assert data.records[0].labels.tolist() == [1]


def test_a_category_outside_the_classes_is_an_error_by_default(write):
    assert problem(write, GOOD, classes=["dog"]) == (
        "annotation 2: class must be one of the 1 classes, got 'cat'; "
        "add it to classes or set other_classes: ignore"
    )


def test_a_class_that_is_no_category_is_an_error_with_the_closest(write):
    text = problem(write, GOOD, classes=["cat", "dogg"], other_classes="ignore")
    assert text == "classes: must be categories of the file, got 'dogg'; closest: 'dog'"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bbox": [1, 2, -3, 4]}, "bbox must not have a negative width or height, got [1, 2, -3, 4]"),
        ({"bbox": [99, 2, 3, 4]}, "bbox must lie inside the image of 100x80, got [99, 2, 3, 4]"),
        ({"bbox": [-2, 2, 3, 4]}, "bbox must lie inside the image of 100x80, got [-2, 2, 3, 4]"),
        ({"bbox": [1, 2, 3]}, "bbox must be four numbers, got [1, 2, 3]"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox must be four numbers, got [1, 2, 3, nan]"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox must be four numbers, got [1, 2, 3, 1" + "0" * 46 + "..."),
        ({"bbox": [True, 2, 3, 4]}, "bbox must be four numbers, got [True, 2, 3, 4]"),
        (
            {"bbox": [99.99999999, 2, 1, 4]},
            "bbox must lie inside the image of 100x80, got [99.99999999, 2, 1, 4]",
        ),
        ({"category_id": 5}, "category_id must be the id of a category, got 5"),
        ({"image_id": 5}, "image_id must be the id of an image, got 5"),
    ],
)
def test_each_mistake_in_an_annotation_has_its_sentence(write, values, text):
    assert problem(write, changed("annotations", 0, **values)) == f"annotation 1: {text}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], "top level: must be an object, got list"),
        ({"images": [], "categories": []}, "annotations: must be a list, got NoneType"),
        ({**GOOD, "images": []}, "images: must not be empty, got none"),
        ({**GOOD, "categories": [{"id": 1}]}, "categories[0]: must have 'name', got ['id']"),
        (changed("images", 1, width="50"), "images[1]: width must be a positive integer, got '50'"),
        (changed("images", 1, id=7), "images[1]: id must be unique, got 7 again"),
        (changed("images", 1, width=True), "images[1]: width must be a positive integer, got True"),
        (changed("images", 1, id=True), "images[1]: id must be a whole number or a text, got True"),
        (changed("images", 1, id="7"), "images[1]: id must be unique, got '7' again"),
        (
            changed("images", 1, width=10**9),
            "image 3: size: image must have 1 to 89478485 pixels, got 1000000000x40",
        ),
        (
            changed("images", 1, file_name="\ud800"),
            r"images[1]: file_name must be valid Unicode, got '\ud800'",
        ),
        (changed("categories", 1, name="dog"), "classes: names must differ, got 'dog' more than once"),
        ('{"images": [], "images": []}', "must be JSON, got the key 'images' twice in one object"),
        (changed("images", 1, id=[7]), "images[1]: id must be a whole number or a text, got [7]"),
        (
            "{",
            "must be JSON, got Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
    ],
)
def test_a_malformed_file_is_refused_before_it_is_indexed(write, content, text):
    assert problem(write, content) == text


def test_images_must_exist_inside_their_folder(write):
    content = changed("images", 0, file_name="../x.json")
    content["images"][1]["file_name"] = "sub/c.jpg"
    lines = problem(write, content).splitlines()
    assert lines[0] == "2 problems"
    assert lines[1] == "  image 7: file_name must stay inside the images' folder, got '../x.json'"
    assert lines[2].startswith("  image 3: file_name must exist in ")
    assert lines[2].endswith("got 'sub/c.jpg'")


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: folder of the images does not exist"):
        read_coco("nowhere", "x.json")
    with pytest.raises(UserError, match=r"x.json: cannot be read, got No such file or directory"):
        read_coco(tmp_path, "x.json")


def test_ids_may_be_numbers_and_texts(write):
    content = changed("categories", 1, id="four")
    content["annotations"][1]["category_id"] = "four"
    assert read_coco(*write(content)).records[0].labels.tolist() == [1, 2]


def test_a_byte_order_mark_is_passed_over_and_another_encoding_refused(write):
    images, path = write(GOOD)
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert len(read_coco(images, path)) == 2
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"x.json: must be JSON in UTF-8, got 'utf-8' codec can't decode"):
        read_coco(images, path)


def test_a_scan_keeps_what_is_right_and_knows_the_boxes_of_what_is_not(write):
    content = changed("annotations", 0, bbox=[9, 9, -3, 4])
    content["images"].append({"id": 8, "file_name": "none.jpg", "width": 5, "height": 5})
    content["annotations"].append({"id": 4, "image_id": 3})
    images, path = write(content)
    scan = scan_coco(images, path)
    assert [record.id for record in scan.data.records] == ["7", "3"]
    assert scan.data.records[0].labels.tolist() == [1]
    assert [(found.where, found.kind, found.box) for found in scan.problems] == [
        ("annotations[3]", "annotation", None),
        ("annotation 1", "box", (9, 9, 6, 13)),
        ("image 8", "no image", None),
    ]
    assert scan.problems[1].image == f"{images}/sub/b.jpg"
