"""The synthetic devkit: drawing, annotation, and a folder that appears whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lbdet.data import shapes
from lbdet.data.shapes import SHAPE_CLASSES, Scene, ShapeObject, draw_scene, read_shapes, render_shapes
from lbdet.errors import UserError

SMALL = (72, 56)
PICTURE = (slice(2, 12), slice(2, 12))  # of a 14 x 14 canvas


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(0, "val", index) for index in range(60)]


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "devkit"
    render_shapes(root, seed=3, train=3, val=2, size=SMALL)
    return root


def _objects(scenes: list[Scene]) -> list[ShapeObject]:
    return [shape for scene in scenes for shape in scene.objects]


def _mask(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((14, 14), bool)
    mask[rows, columns] = True
    return mask


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    first, again = draw_scene(5, "train", 7, SMALL), draw_scene(5, "train", 7, SMALL)
    assert np.array_equal(first.image, again.image)
    assert [(o.name, o.box, o.area) for o in first.objects] == [
        (o.name, o.box, o.area) for o in again.objects
    ]
    for other in (
        draw_scene(6, "train", 7, SMALL),
        draw_scene(5, "val", 7, SMALL),
        draw_scene(5, "train", 8, SMALL),
    ):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [(192, 160), (160, 192), (40, 300), (32, 32)])
def test_a_scene_has_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    for index in range(4):
        scene = draw_scene(0, "train", index, size)
        assert scene.image.shape == (size[1], size[0], 3)
        assert scene.image.dtype == np.uint8
        assert all(o.visible.shape == (size[1], size[0]) for o in scene.objects)


def test_every_scene_has_one_to_five_objects_and_every_class_is_drawn(scenes: list[Scene]) -> None:
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4, 5}
    assert {shape.name for shape in _objects(scenes)} == set(SHAPE_CLASSES)


def test_boxes_lie_in_the_picture_and_touch_the_visible_pixels_on_all_four_sides(scenes: list[Scene]) -> None:
    for shape in _objects(scenes):
        x1, y1, x2, y2 = shape.box
        assert 0 <= x1 < x2 <= 192
        assert 0 <= y1 < y2 <= 160
        inside = shape.visible[y1:y2, x1:x2]
        assert inside.sum() == shape.visible.sum()
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_no_pixel_belongs_to_two_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert sum(o.visible.astype(int) for o in scene.objects).max() == 1


def test_scenes_have_covered_difficult_and_cut_off_objects_but_mostly_whole_ones(scenes: list[Scene]) -> None:
    found = _objects(scenes)
    assert any(o.difficult for o in found)
    assert any(o.truncated for o in found)
    assert np.mean([o.visibility > 0.9 for o in found]) > 0.5
    assert min(o.visibility for o in found) >= shapes.DROPPED_BELOW


def test_a_later_object_covers_an_earlier_one() -> None:
    below, above = _mask(slice(2, 6), slice(2, 12)), _mask(slice(2, 6), slice(5, 12))
    first, second = shapes._annotate([("disc", below), ("star", above)], PICTURE)
    assert (first.name, first.box, first.area, first.visibility) == ("disc", (0, 0, 3, 4), 40, 0.3)
    assert (second.name, second.box, second.visibility) == ("star", (3, 0, 10, 4), 1.0)
    assert not first.truncated


@pytest.mark.parametrize(
    "covered, expected",
    [(0, [False]), (60, [False]), (61, [True]), (85, [True]), (86, [])],
)
def test_an_object_is_difficult_below_40_percent_and_dropped_below_15(
    covered: int, expected: list[bool]
) -> None:
    whole = _mask(*PICTURE)
    above = np.zeros_like(whole)
    above[tuple(axis[:covered] for axis in np.nonzero(whole))] = True
    annotated = shapes._annotate([("ring", whole), ("cross", above)], PICTURE)
    assert [o.difficult for o in annotated if o.name == "ring"] == expected


def test_what_lies_beyond_the_edge_counts_as_area_that_is_not_visible() -> None:
    (shape,) = shapes._annotate([("square", _mask(slice(4, 8), slice(0, 4)))], PICTURE)
    assert (shape.box, shape.area, shape.visibility, shape.truncated) == ((0, 2, 2, 6), 16, 0.5, True)


@pytest.mark.parametrize("seed", range(12))
def test_an_objects_mask_is_where_its_colour_is(seed: int) -> None:
    canvas = np.full((140, 150, 3), 0.9, np.float32)  # grey stays grey under a shadow; objects are saturated
    _, mask = shapes._paint(np.random.default_rng(seed), canvas, (slice(30, 110), slice(30, 120)), light=1.0)
    coloured = canvas.max(-1) - canvas.min(-1) > 0.005
    assert (mask & ~coloured).sum() <= 0.15 * mask.sum()  # two hues can mix to grey
    for axis in (0, 1):
        drawn, masked = np.flatnonzero(coloured.any(axis)), np.flatnonzero(mask.any(axis))
        assert 0 <= masked[0] - drawn[0] <= 1  # half covered pixels are coloured, too
        assert 0 <= drawn[-1] - masked[-1] <= 1


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_an_outline_is_a_distance_inside_a_circle_of_about_radius_one(name: str) -> None:
    outline = shapes._OUTLINES[name]
    angle = np.linspace(0, 2 * math.pi, 360)
    assert (outline(1.12 * np.cos(angle), 1.12 * np.sin(angle)) > 0).all()
    y, x = np.mgrid[-1.2:1.2:481j, -1.2:1.2:481j]
    distance = outline(x, y)
    slope = np.hypot(*np.gradient(distance, 2.4 / 480))
    assert slope[np.abs(distance) < 0.02].mean() == pytest.approx(1, abs=0.05)
    assert (outline(np.array([0.0]), np.array([0.0])) < 0) == (name != "ring")


def test_triangles_and_stars_stand_upright() -> None:
    top, bottom = (np.array([0.0]), np.array([-0.95])), (np.array([0.0]), np.array([0.95]))
    for name in ("triangle", "star"):
        assert shapes._OUTLINES[name](*top) < 0 < shapes._OUTLINES[name](*bottom)


def test_colour_does_not_tell_the_class() -> None:
    means: dict[str, list[np.ndarray]] = {name: [] for name in SHAPE_CLASSES}
    for index in range(60):
        scene = draw_scene(1, "train", index, SMALL)
        for shape in scene.objects:
            means[shape.name].append(scene.image[shape.visible].mean(0))
    spread = np.std([m for found in means.values() for m in found], axis=0)
    between = np.std([np.mean(found, axis=0) for found in means.values()], axis=0)
    assert (between < 0.5 * spread).all()


def test_the_xml_has_vocs_coordinates_which_start_at_one_and_include_the_last(devkit: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        ids = (devkit / "VOC2012/ImageSets/Main" / f"{split}.txt").read_text().split()
        assert len(ids) == count
        for index, name in enumerate(ids):
            scene = draw_scene(3, split, index, SMALL)
            tree = ElementTree.parse(devkit / f"VOC2012/Annotations/{name}.xml")
            assert [tree.findtext(f"size/{k}") for k in ("width", "height", "depth")] == ["72", "56", "3"]
            found = [
                (
                    o.findtext("name"),
                    *(int(o.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")),
                )
                for o in tree.iter("object")
            ]
            assert found == [(o.name, o.box[0] + 1, o.box[1] + 1, o.box[2], o.box[3]) for o in scene.objects]
            flags = [(o.findtext("truncated"), o.findtext("difficult")) for o in tree.iter("object")]
            assert flags == [(str(int(o.truncated)), str(int(o.difficult))) for o in scene.objects]


def test_the_pictures_on_disk_are_the_scenes(devkit: Path) -> None:
    scene = draw_scene(3, "val", 1, SMALL)
    image = np.asarray(Image.open(devkit / "VOC2012/JPEGImages/val_00001.jpg"), float)
    assert np.abs(image - scene.image).mean() < 8


def test_reading_gives_half_open_boxes_in_the_order_of_the_scene(tmp_path: Path) -> None:
    data = read_shapes(tmp_path / "devkit", ("val", "train"), seed=4, train=2, val=1)
    assert data.classes == SHAPE_CLASSES
    assert [record.id for record in data.records] == ["val_00000", "train_00000", "train_00001"]
    scene = draw_scene(4, "train", 1)
    assert data.records[2].boxes.tolist() == [list(map(float, o.box)) for o in scene.objects]
    assert [SHAPE_CLASSES[k - 1] for k in data.records[2].labels] == [o.name for o in scene.objects]
    assert data.records[2].difficult.tolist() == [o.difficult for o in scene.objects]
    assert (data.records[2].width, data.records[2].height) == (192, 160)


def test_more_images_leave_the_first_ones_as_they_are(devkit: Path, tmp_path: Path) -> None:
    render_shapes(tmp_path / "fewer", seed=3, train=1, val=1, size=SMALL)
    many, few = _files(devkit), _files(tmp_path / "fewer")
    for name in ("JPEGImages/train_00000.jpg", "Annotations/train_00000.xml", "JPEGImages/val_00000.jpg"):
        assert many[f"VOC2012/{name}"] == few[f"VOC2012/{name}"]


def test_the_same_parameters_again_do_nothing(devkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(devkit)
    monkeypatch.setattr(shapes, "_write_split", lambda *_: pytest.fail("rendered again"))
    render_shapes(devkit, seed=3, train=3, val=2, size=SMALL)
    assert _files(devkit) == before


def test_other_parameters_are_refused_and_change_nothing(devkit: Path) -> None:
    before = _files(devkit)
    with pytest.raises(UserError) as error:
        render_shapes(devkit, seed=9, train=3, val=2, size=SMALL)
    wanted = json.dumps({"version": 1, "seed": 9, "train": 3, "val": 2, "size": [72, 56]})
    found = wanted.replace('"seed": 9', '"seed": 3')
    assert str(error.value) == (
        f"{devkit}/shapes.json: must be {wanted}, got {found}; remove {devkit} or name another folder"
    )
    assert _files(devkit) == before


def test_a_folder_with_anything_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for root in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError) as error:
            render_shapes(root, train=1, val=1, size=SMALL)
        assert str(error.value) == (
            f"{root}: must be absent, empty or a rendered devkit, got a folder or file without shapes.json; "
            "name another folder"
        )
    assert _files(tmp_path) == {"notes.txt": b"mine"}


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    render_shapes(tmp_path, train=1, val=1, size=SMALL)
    assert (tmp_path / "VOC2012/JPEGImages/train_00000.jpg").is_file()


def test_a_count_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        render_shapes(tmp_path / "x", val=0)
    assert str(error.value) == f"{tmp_path}/x: val must be at least 1 image, got 0; give a larger number"


def test_an_interrupted_rendering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int, split: str, index: int, size: tuple[int, int]) -> Scene:
        if split == "val":
            raise KeyboardInterrupt
        return draw_scene(seed, split, index, size)

    monkeypatch.setattr(shapes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_shapes(tmp_path / "devkit", train=1, val=1, size=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed, text", [(3, None), (8, "shapes.json: must be")])
def test_another_process_that_was_faster_wins(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, text: str | None
) -> None:
    root = tmp_path / "devkit"
    write_split = shapes._write_split

    def slow(year: Path, seed: int, split: str, count: int, size: tuple[int, int]) -> None:
        write_split(year, seed, split, count, size)
        if split == "val":
            shutil.copytree(devkit, root)

    monkeypatch.setattr(shapes, "_write_split", slow)
    if text is None:
        render_shapes(root, seed=seed, train=3, val=2, size=SMALL)
    else:
        with pytest.raises(UserError, match=text):
            render_shapes(root, seed=seed, train=3, val=2, size=SMALL)
    assert _files(root) == _files(devkit)
    assert [path.name for path in tmp_path.iterdir()] == ["devkit"]
