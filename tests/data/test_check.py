"""What a look at a whole data set finds, beyond what the readers refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbdet.data.check import (
    Check,
    check_detection,
    check_labelled,
    clean_coco,
    clean_lists,
    found_classes,
    in_both,
)
from lbdet.data.classification import scan_image_folder
from lbdet.data.coco import read_coco, scan_coco
from lbdet.data.voc import read_voc, scan_voc

CLASSES = ("cat", "dog")
Objects = list[tuple[str, tuple[int, int, int, int]]]
CAT: Objects = [("cat", (11, 21, 30, 40))]


def write_image(path: Path, seed: int, size: tuple[int, int] = (100, 80)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_voc(folder: Path, images: dict[str, Objects], split: str = "train") -> Path:
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed, (name, objects) in enumerate(images.items()):
        write_image(folder / "JPEGImages" / f"{name}.jpg", seed)
        tags = ("xmin", "ymin", "xmax", "ymax")
        text = "".join(
            f"<object><name>{c}</name><bndbox>"
            + "".join(f"<{t}>{v}</{t}>" for t, v in zip(tags, box, strict=True))
            + "</bndbox></object>"
            for c, box in objects
        )
        size = "<size><width>100</width><height>80</height></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    return folder


def checked(folder: Path, input_size: int = 320) -> Check:
    return check_detection(scan_voc(folder, ["train"], CLASSES), folder, input_size)


def found(check: Check) -> list[tuple[str, str]]:
    return [(problem.kind, f"{problem.where}: {problem.rule}") for problem in check.problems]


def test_a_clean_data_set_has_no_problems_and_its_classes_are_counted(tmp_path: Path) -> None:
    images = {"a": CAT * 1, "b": [("dog", (1, 1, 9, 9)), ("dog", (1, 1, 50, 50)), *CAT]}
    check = checked(write_voc(tmp_path, images))
    assert found(check) == []
    assert [(c.name, c.objects, c.images, c.difficult) for c in check.classes] == [
        ("cat", 2, 2, 0), ("dog", 2, 1, 0),
    ]  # fmt: skip


def test_errors_come_first_and_all_of_them_are_named(tmp_path: Path) -> None:
    images = {"a": CAT, "b": [("cat", (40, 1, 39, 10)), ("dgo", (1, 1, 5, 5))], "c": CAT, "d": CAT, "e": []}
    folder = write_voc(tmp_path, images)
    (folder / "JPEGImages/c.jpg").write_bytes((folder / "JPEGImages/c.jpg").read_bytes()[:900])
    write_image(folder / "JPEGImages/d.jpg", 9, (50, 80))
    kinds, texts = zip(*found(checked(folder)), strict=True)
    assert kinds == ("box", "class", "image", "image", "no objects", "no example")
    assert texts[2].startswith(
        "JPEGImages/c.jpg: must be a whole JPEG or PNG image, got image file is truncated"
    )
    assert texts[3].startswith("JPEGImages/d.jpg: image must be 100x80 as annotated, got 50x80")
    assert texts[4] == "JPEGImages/e.jpg: has no objects"  # b has objects, though none without an error
    assert texts[5] == "class dog: has no example"


def test_the_same_box_and_the_same_picture_are_told(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": CAT * 2 + [("dog", CAT[0][1])], "b": CAT})
    shutil.copyfile(folder / "JPEGImages/a.jpg", folder / "JPEGImages/b.jpg")
    assert found(checked(folder)) == [
        ("same box", "JPEGImages/a.jpg: cat at 10,20 to 30,40: stands twice in this image"),
        ("same picture", "JPEGImages/b.jpg: is the same file as JPEGImages/a.jpg"),
    ]


@pytest.mark.parametrize(("input_size", "small"), [(79, 1), (80, 0)])
def test_a_box_is_small_by_its_shorter_side_at_the_detectors_input(
    input_size: int, small: int, tmp_path: Path
) -> None:
    folder = write_voc(tmp_path, {"a": [("dog", (11, 1, 60, 40)), ("cat", (11, 1, 30, 2))]})  # 2 of 80 pixels
    kinds = [kind for kind, _ in found(checked(folder, input_size))]
    assert kinds.count("small box") == small


def test_cleaned_lists_load_and_are_clean(tmp_path: Path) -> None:
    images = {"a": CAT, "b": [("cat", (40, 1, 39, 10))], "c": [("dog", (1, 1, 50, 50))], "d": CAT}
    folder = write_voc(tmp_path / "data", images)
    (folder / "JPEGImages/d.jpg").write_bytes(b"")
    ((place, names),) = clean_lists(checked(folder)).items()
    assert (place, names) == (str(folder), ["a", "c"])
    (tmp_path / "clean.txt").write_text("\n".join(names))
    assert len(read_voc(folder, [str(tmp_path / "clean.txt")], CLASSES)) == 2


def test_classes_are_found_where_none_are_given(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": CAT, "b": [("dog", (1, 1, 5, 5)), ("ant", (1, 1, 5, 5))], "c": []})
    (folder / "Annotations/c.xml").write_text("no xml")
    assert found_classes(folder, ["train"]) == ("ant", "cat", "dog")


def test_a_picture_of_two_groups_is_told(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": CAT, "b": CAT})
    (folder / "ImageSets/Main/val.txt").write_text("b\n")
    checks = {
        split: check_detection(scan_voc(folder, [split], CLASSES), folder, 320) for split in ("train", "val")
    }
    (problem,) = in_both(checks)
    assert f"{problem.where}: {problem.rule}" == f"{folder}/JPEGImages/b.jpg: is in train and in val"


def test_a_cleaned_coco_file_loads_without_the_images_that_had_errors(tmp_path: Path) -> None:
    for seed, name in enumerate("abcd"):
        write_image(tmp_path / f"{name}.png", seed)
    images = [{"id": k, "file_name": f"{n}.png", "width": 100, "height": 80} for k, n in enumerate("abcdx")]
    rows = [(1, 0, [1, 2, 3, 4]), (2, 1, [1, 2, -3, 4]), (3, 1, [5, 5, 5, 5]), (4, 2, [1, 1, 9, 9])]
    annotations = [{"id": i, "image_id": k, "category_id": 1, "bbox": box} for i, k, box in rows]
    content = {
        "info": "kept", "images": images, "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            *annotations, {"id": 5, "image_id": 2}, {"id": 6, "image_id": 77, "category_id": 1, "bbox": []},
        ],
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(content))
    check = check_detection(scan_coco(tmp_path, tmp_path / "x.json"), tmp_path, 320)
    assert sorted(problem.where for problem in check.errors) == [
        "annotation 2",
        "annotation 6",
        "annotations[4]",
        "image 4",
    ]
    cleaned = clean_coco(check, tmp_path / "x.json")
    (tmp_path / "clean.json").write_text(json.dumps(cleaned))
    data = read_coco(tmp_path, tmp_path / "clean.json")
    assert [record.id for record in data.records] == ["0", "3"]  # 1 and 2 have objects with errors, 4 no file
    assert cleaned["info"] == "kept"
    assert [row["id"] for row in cleaned["annotations"]] == [1]


def test_folders_of_classes_are_checked_image_by_image(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.bmp")):
        write_image(tmp_path / "train" / name, seed)
    (tmp_path / "train/cat/b.png").write_bytes(b"x")
    check = check_labelled(scan_image_folder(tmp_path, "train"), tmp_path)
    kinds, texts = zip(*found(check), strict=True)
    assert kinds == ("image", "image")
    assert texts[0] == "dog/d.bmp: image must be JPEG or PNG, got .bmp; convert it"
    assert texts[1] == "train/cat/b.png: must be a whole JPEG or PNG image, got another kind of file"
    assert [(c.name, c.objects) for c in check.classes] == [("cat", 2), ("dog", 2)]
