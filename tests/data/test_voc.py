"""The VOC reader: what it makes of a correct folder, and what it says about each mistake."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from fuzz.guards import in_time

from lbdet.classes import VOC20
from lbdet.data import voc
from lbdet.data.voc import clip_box, download_voc, label_map, read_voc, scan_voc
from lbdet.errors import UserError

CLASSES = ("cat", "dog")


def an_object(
    name: str = "cat", box: tuple = (11, 21, 30, 40), extra: str = "<difficult>0</difficult>"
) -> str:
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def an_annotation(*objects: str, size: str = "<size><width>100</width><height>80</height></size>") -> str:
    return f"<annotation><filename>wrong.jpg</filename>{size}{''.join(objects)}</annotation>"


def make_voc(folder: Path, annotations: dict[str, str], split: str = "train", suffix: str = ".jpg") -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, text in annotations.items():
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        (folder / "JPEGImages" / f"{name}{suffix}").write_bytes(b"")
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in annotations))
    return folder


def problem(root: Path, annotation: str) -> str:
    with pytest.raises(UserError) as caught:
        read_voc(make_voc(root, {"a": annotation}), ["train"], CLASSES)
    assert str(caught.value).startswith(f"{root}: Annotations/a.xml: ")
    return str(caught.value).removeprefix(f"{root}: Annotations/a.xml: ")


def test_closed_1_based_corners_become_half_open_0_based_boxes(tmp_path):
    text = an_annotation(an_object("dog", (1, 1, 100, 80)), an_object("cat", ("45.7", 20, "60.2", 20)))
    record = read_voc(make_voc(tmp_path, {"a": text}), ["train"], CLASSES).records[0]
    np.testing.assert_array_equal(record.boxes, np.float32([[0, 0, 100, 80], [44.7, 19, 60.2, 20]]))
    assert record.boxes.dtype == np.float32
    assert record.labels.dtype == np.int64
    assert record.labels.tolist() == [2, 1]
    assert (record.id, record.width, record.height) == ("a", 100, 80)


def test_difficult_is_read_and_defaults_to_false(tmp_path):
    hard, easy = (an_object(extra=f"<difficult>{flag}</difficult>") for flag in (1, 0))
    text = an_annotation(hard, easy, an_object())
    record = read_voc(make_voc(tmp_path, {"a": text}), ["train"], CLASSES).records[0]
    assert record.difficult.tolist() == [True, False, False]
    assert record.difficult.dtype == bool


def test_an_image_without_objects_has_empty_boxes_of_shape_0_by_4(tmp_path):
    record = read_voc(make_voc(tmp_path, {"a": an_annotation()}), ["train"], CLASSES).records[0]
    assert record.boxes.shape == (0, 4)
    assert record.labels.shape == record.difficult.shape == (0,)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".JPG"])
def test_the_image_is_found_by_the_name_of_the_annotation_not_by_filename(tmp_path, suffix):
    data = read_voc(make_voc(tmp_path, {"a.b": an_annotation()}, suffix=suffix), ["train"], CLASSES)
    assert data.records[0].path == str(tmp_path / "JPEGImages" / f"a.b{suffix}")


def test_parts_of_an_object_are_not_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    data = read_voc(make_voc(tmp_path, {"a": an_annotation(an_object(extra=part))}), ["train"], CLASSES)
    assert data.records[0].boxes.tolist() == [[10, 20, 30, 40]]


@pytest.mark.parametrize("inner", ["", "VOCdevkit"])
def test_splits_of_several_years_are_joined_with_the_year_in_the_id(tmp_path, inner):
    make_voc(tmp_path / inner / "VOC2007", {"a": an_annotation()}, "trainval")
    make_voc(tmp_path / inner / "VOC2012", {"a": an_annotation(), "b": an_annotation()}, "trainval")
    both = read_voc(tmp_path, ["2007:trainval", "2012:trainval"], CLASSES)
    assert [record.id for record in both.records] == ["2007_a", "2012_a", "2012_b"]
    one = read_voc(tmp_path, ["2012:trainval"], CLASSES)
    assert [record.id for record in one.records] == ["a", "b"]


def test_only_the_annotations_of_the_split_are_read(tmp_path):
    make_voc(tmp_path, {"broken": "no xml"}, "test")
    assert len(read_voc(make_voc(tmp_path, {"a": an_annotation()}), ["train"], CLASSES).records) == 1


def test_a_two_column_split_lists_the_images_whose_flag_is_not_minus_one(tmp_path):
    make_voc(tmp_path, {name: an_annotation() for name in "abc"})
    (tmp_path / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\n\nc  0\n")
    data = read_voc(tmp_path, ["cat_train"], CLASSES)
    assert [record.id for record in data.records] == ["a", "c"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("../../secret", "line 1 must name a file without a folder, got '../../secret'"),
        ("/etc/passwd", "line 1 must name a file without a folder, got '/etc/passwd'"),
        ("a b c", "line 1 must be an image name, or one and -1, 0 or 1, got 'a b c'"),
        ("a 2", "line 1 must be an image name, or one and -1, 0 or 1, got 'a 2'"),
        ("x" * 999 + " 2", f"line 1 must be an image name, or one and -1, 0 or 1, got '{'x' * 56}..."),
        ("x" * 999 + "/", f"line 1 must name a file without a folder, got '{'x' * 56}..."),
        ("a\\b", r"line 1 must name a file without a folder, got 'a\\b'"),
        ("a..b", "line 1 must name a file without a folder, got 'a..b'"),
        ("a\0b", r"line 1 must name a file without a folder, got 'a\x00b'"),
        ("", "train.txt must list at least one image, got none"),
    ],
)
def test_a_bad_line_of_a_split_is_refused(tmp_path, line, text):
    make_voc(tmp_path, {"a": an_annotation()})
    (tmp_path / "ImageSets/Main/train.txt").write_text(f"{line}\n")
    with pytest.raises(UserError) as caught:
        read_voc(tmp_path, ["train"], CLASSES)
    assert str(caught.value) == f"{tmp_path}: split 'train': {text}"


def test_an_inverted_box_is_told_by_file_and_object(tmp_path):
    text = problem(tmp_path, an_annotation(an_object(), an_object(box=(40, 1, 39, 10))))
    assert text == "object 2: xmax must not be less than xmin, got xmin=40 xmax=39"


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (
            an_annotation(an_object(box=(1, 9, 5, 8))),
            "object 1: ymax must not be less than ymin, got ymin=9 ymax=8",
        ),
        (
            an_annotation(an_object(box=(1, 1, 102, 8))),
            "object 1: box must lie inside the image of 100x80, got xmin=1 ymin=1 xmax=102 ymax=8",
        ),
        (
            an_annotation(an_object(box=(-1, 1, 9, 8))),
            "object 1: box must lie inside the image of 100x80, got xmin=-1 ymin=1 xmax=9 ymax=8",
        ),
        (
            an_annotation(an_object(box=(101, 1, 101, 8))),
            "object 1: box must lie inside the image of 100x80, got xmin=101 ymin=1 xmax=101 ymax=8",
        ),
        (an_annotation(an_object(box=("nan", 1, 9, 8))), "object 1: xmin must be a number, got 'nan'"),
        (an_annotation(an_object(box=(1, "x", 9, 8))), "object 1: ymin must be a number, got 'x'"),
        (an_annotation("<object><name>cat</name></object>"), "object 1: must have a <bndbox>, got none"),
        (an_annotation("<object></object>"), "object 1: must have a <name>, got none"),
        (
            an_annotation(an_object(extra="<difficult>yes</difficult>")),
            "object 1: <difficult> must be 0 or 1, got 'yes'",
        ),
        (
            an_annotation(an_object("dgo")),
            "object 1: class must be one of the 2 classes, got 'dgo'; "
            "add it to classes or set other_classes: ignore; closest: 'dog'",
        ),
        (an_annotation(size=""), "must have a <size>, got none"),
        (
            an_annotation(size="<size><width>0</width><height>80</height></size>"),
            "<size> must be positive integers, got width=0 height=80",
        ),
        ("<annotation>", "must be plain XML, got no element found: line 1, column 12"),
    ],
)
def test_each_mistake_in_an_annotation_has_its_sentence(tmp_path, annotation, text):
    assert problem(tmp_path, annotation) == text


def test_entities_are_refused_before_they_expand(tmp_path):
    entities = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 12))
    start = time.process_time()
    text = problem(tmp_path, f"<!DOCTYPE x [{entities}]><annotation>&a11;</annotation>")
    assert text.startswith("must be plain XML, got EntitiesForbidden")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (
            an_annotation(size=f"<size><width>{'9' * 5000}</width><height>80</height></size>"),
            f"<size> must be positive integers, got width={'9' * 57}... height=80",
        ),
        (
            an_annotation(size="<size><width>1000000000</width><height>80</height></size>"),
            "<size> must be positive integers, got width=1000000000 height=80",
        ),
        (
            an_annotation(size="<size><width>99999</width><height>99999</height></size>"),
            "<size>: image must have 1 to 89478485 pixels, got 99999x99999",
        ),
        (
            an_annotation(an_object(box=("100.9999999", 1, "100.9999999", 9))),
            "object 1: box must lie inside the image of 100x80, "
            "got xmin=100.9999999 ymin=1 xmax=100.9999999 ymax=9",
        ),
        (
            an_annotation(an_object(extra=f"<difficult>{'1' * 5000}</difficult>")),
            f"object 1: <difficult> must be 0 or 1, got '{'1' * 56}...",
        ),
        (
            an_annotation(an_object(box=("0" * 5000 + "9", 1, 5, 8))),
            f"object 1: xmax must not be less than xmin, got xmin={'0' * 57}... xmax=5",
        ),
        (
            an_annotation(an_object(box=("1\u202e\n2", 1, 9, 8))),
            r"object 1: xmin must be a number, got '1\u202e\n2'",
        ),
    ],
)
def test_values_that_no_image_has_are_told_in_one_short_line(tmp_path, annotation, text):
    assert problem(tmp_path, annotation) == text


def test_what_is_left_of_a_clipped_box_has_an_area_in_float32():
    assert clip_box((99.99999999, 0, 101, 5), 100, 80) is None
    assert clip_box((99.99, 0, 101, 5), 100, 80) == (99.99, 0, 100, 5)


def test_a_long_class_is_cut_and_the_closest_name_looked_for_once(tmp_path, monkeypatch):
    with in_time(5):
        text = problem(tmp_path, an_annotation(an_object("x" * 100_000)))
    assert len(text) < 200
    seen = []
    monkeypatch.setattr(voc, "closest", lambda name, names: seen.append(name) or "")
    many = an_annotation(*(an_object(f"class {k % 10}") for k in range(1000)))
    with pytest.raises(UserError, match="1000 problems"):
        read_voc(make_voc(tmp_path / "many", {"a": many}), ["train"], CLASSES)
    assert sorted(seen) == [f"class {k}" for k in range(10)]
    for k in range(5000):
        voc._closest(f"class {k}", CLASSES)
    assert voc._closest.cache_info().currsize < 5000


def test_many_classes_are_mapped_in_no_time():
    start = time.process_time()
    assert label_map([str(k) for k in range(100_000)])["99999"] == 100_000
    assert time.process_time() - start < 1


def test_a_list_that_is_too_large_is_refused(tmp_path, monkeypatch):
    make_voc(tmp_path, {"a": an_annotation()})
    monkeypatch.setattr(voc, "MAX_SPLIT", 1)
    with pytest.raises(UserError, match=r"train\.txt must be UTF-8 text, got a file of more than 0 KiB"):
        read_voc(tmp_path, ["train"], CLASSES)


def test_an_annotation_that_is_a_pipe_or_too_large_is_refused(tmp_path, monkeypatch):
    make_voc(tmp_path, {"a": an_annotation(), "b": an_annotation()})
    (tmp_path / "Annotations/a.xml").unlink()
    os.mkfifo(tmp_path / "Annotations/a.xml")
    monkeypatch.setattr(voc, "MAX_XML", 10)
    with in_time(5), pytest.raises(UserError) as caught:
        read_voc(tmp_path, ["train"], CLASSES)
    assert str(caught.value).splitlines()[1:] == [
        "  Annotations/a.xml: must be plain XML, got not a regular file",
        "  Annotations/b.xml: must be plain XML, got a file of more than 0 KiB",
    ]


def test_a_list_that_lies_elsewhere_is_a_split(tmp_path):
    make_voc(tmp_path / "VOC2012", {"a": an_annotation(), "b": an_annotation()})
    (tmp_path / "some.txt").write_text("b\n")
    data = read_voc(tmp_path, [f"2012:{tmp_path / 'some.txt'}"], CLASSES)
    assert [record.id for record in data.records] == ["b"]
    with pytest.raises(UserError, match=r"none.txt must be in .*, got no such file"):
        read_voc(tmp_path, [f"2012:{tmp_path / 'none.txt'}"], CLASSES)


def test_a_scan_keeps_what_is_right_and_knows_the_boxes_of_what_is_not(tmp_path):
    boxes = [(1, 1, 9, 8), (40, 1, 39, 10), (1, 1, 999, 8)]
    text = an_annotation(*(an_object(box=box) for box in boxes), an_object("cow", (2, 2, 5, 5)))
    scan = scan_voc(make_voc(tmp_path, {"a": text, "b": "no xml"}), ["train"], CLASSES)
    assert [record.boxes.tolist() for record in scan.data.records] == [[[0, 0, 9, 8]]]
    assert [(found.where, found.kind, found.box) for found in scan.problems] == [
        ("Annotations/a.xml: object 2", "box", (39, 0, 39, 10)),
        ("Annotations/a.xml: object 3", "box", (0, 0, 999, 8)),
        ("Annotations/a.xml: object 4", "class", (1, 1, 5, 5)),
        ("Annotations/b.xml", "annotation", None),
    ]
    assert {found.image for found in scan.problems} == {f"{tmp_path}/JPEGImages/{name}.jpg" for name in "ab"}


def test_a_box_within_a_pixel_of_the_image_is_clipped(tmp_path):
    text = an_annotation(an_object(box=(0, 0, 101, 80.5)))
    record = read_voc(make_voc(tmp_path, {"a": text}), ["train"], CLASSES).records[0]
    assert record.boxes.tolist() == [[0, 0, 100, 80]]


def test_other_classes_can_be_ignored(tmp_path):
    text = an_annotation(an_object("bird"), an_object("dog"))
    data = read_voc(make_voc(tmp_path, {"a": text}), ["train"], CLASSES, other_classes="ignore")
    assert data.records[0].labels.tolist() == [2]


def test_missing_files_are_all_told_at_once(tmp_path):
    make_voc(tmp_path, {name: an_annotation() for name in "abc"})
    (tmp_path / "Annotations/a.xml").unlink()
    (tmp_path / "JPEGImages/c.jpg").unlink()
    with pytest.raises(UserError) as caught:
        read_voc(tmp_path, ["train", "vla"], CLASSES)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: 3 problems",
        "  Annotations/a.xml: file does not exist",
        "  JPEGImages: must have an image c.jpg (or .jpeg, .png), got none",
        f"  split 'vla': vla.txt must be in {tmp_path}/ImageSets/Main, got no such file",
    ]


def test_ten_problems_are_spelled_out_and_the_others_counted(tmp_path):
    annotations = {f"{k:02}": an_annotation(an_object(box=(50 + k, 1, 9, 8))) for k in range(13)}
    with pytest.raises(UserError) as caught:
        read_voc(make_voc(tmp_path, annotations), ["train"], CLASSES)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 13 problems"
    assert len(lines) == 12
    assert lines[-1] == "  ... and 3 more"


def test_the_same_unknown_class_everywhere_is_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        read_voc(make_voc(tmp_path, {"a": an_annotation(*[an_object("bird")] * 3)}), ["train"], CLASSES)
    assert str(caught.value).startswith(f"{tmp_path}: Annotations/a.xml: object 1: class must be one of")
    assert str(caught.value).endswith("(and 2 more like this)")


def test_an_image_in_two_splits_is_refused(tmp_path):
    make_voc(tmp_path, {"a": an_annotation()}, "trainval")
    make_voc(tmp_path, {"a": an_annotation()})
    with pytest.raises(UserError, match="split 'trainval': an image must be listed once, got 'a' twice"):
        read_voc(tmp_path, ["train", "trainval"], CLASSES)


def test_a_class_named_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="classes: names must differ, got 'cat' more than once"):
        read_voc(tmp_path, ["train"], ("cat", "dog", "cat"))
    with pytest.raises(UserError, match=r"^classes: names must differ, got 'x{56}\.\.\. more than once$"):
        label_map(["x" * 5000, "x" * 5000])


@pytest.mark.parametrize("split", ["", "../2012:train", "2012:../train", "a/b", "..", "a\\b", "a\0b"])
def test_a_split_stays_inside_the_data_set(tmp_path, split):
    make_voc(tmp_path / "VOC2012", {"a": an_annotation()})
    with pytest.raises(UserError, match="must be 'year:split' or 'split'"):
        read_voc(tmp_path, [split], CLASSES)


def test_a_split_written_for_the_other_kind_of_root_is_explained(tmp_path):
    make_voc(tmp_path / "VOC2007", {"a": an_annotation()})
    with pytest.raises(UserError, match="a split of a devkit is written 'year:split'"):
        read_voc(tmp_path, ["train"], CLASSES)
    with pytest.raises(UserError, match="VOC2007 does not exist; a split of one VOC folder has no year"):
        read_voc(tmp_path / "VOC2007", ["2007:train"], CLASSES)


def test_five_hundred_annotations_take_less_than_half_a_second(tmp_path):
    text = an_annotation(an_object(), an_object("dog"), an_object())
    make_voc(tmp_path, {f"{k:06}": text for k in range(500)})
    start = time.process_time()
    read_voc(tmp_path, ["train"], CLASSES)
    assert time.process_time() - start < 0.5  # 21 000 within 20 s


@pytest.mark.parametrize(("year", "splits"), [("2007", ["trainval", "test"]), ("2012", ["trainval"])])
def test_download_asks_torchvision_for_every_published_split(monkeypatch, year, splits):
    calls = []
    monkeypatch.setattr(
        torchvision.datasets, "VOCDetection", lambda *args, **named: calls.append((args, named))
    )
    download_voc("there", year)
    assert calls == [(("there",), {"year": year, "image_set": split, "download": True}) for split in splits]


def test_a_failing_network_is_the_users_business(monkeypatch):
    def fail(*args, **named):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fail)
    with pytest.raises(UserError, match=r"there: download of VOC2012 trainval failed, got URLError: .*route"):
        download_voc("there", "2012")
    with pytest.raises(UserError, match="year: must be one of 2007, 2012, got '1999'"):
        download_voc("there", "1999")


@pytest.mark.skipif(
    not Path("datasets/voc_subset/VOCdevkit").is_dir(), reason="no datasets/voc_subset: make data"
)
def test_the_voc_subset_is_read_whole():
    data = read_voc("datasets/voc_subset", ["2012:train", "2012:val"], VOC20)
    files = list(Path("datasets/voc_subset/VOCdevkit/VOC2012/Annotations").glob("*.xml"))
    assert len(data.records) == len(files)
    objects = sum(path.read_text().count("<object>") for path in files)
    assert sum(len(record.labels) for record in data.records) == objects
    assert data.train_on_difficult


@pytest.mark.skipif(not Path("datasets/bccd").is_dir(), reason="no datasets/bccd: make data")
def test_bccd_is_one_voc_folder():
    data = read_voc("datasets/bccd", ["trainval", "test"], ("WBC", "RBC", "Platelets"))
    assert len(data.records) == 364
    for record in data.records:
        assert (record.boxes[:, 2:] <= [record.width, record.height]).all()
