"""Augmentation is a function of its seed, its transforms are independent, boxes stay on their objects."""

from __future__ import annotations

import pickle
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest

from lbdet.data.augment import MEAN_COLOUR, PRESETS, Zoom, build_augmentation, derive_seed
from lbdet.errors import UserError

BOXES = np.array([[40, 30, 90, 80], [120, 60, 150, 110]], np.float32)
LABELS = np.array([1, 2])
COLOURS = np.array([[255, 0, 0], [0, 255, 0]])
_COMPOSE = "transform: {__class_fullname__: Compose"


def a_scene() -> np.ndarray:
    """Draw the two boxes, red and green, on grey."""
    image = np.full((120, 160, 3), 128, np.uint8)
    for box, colour in zip(BOXES.astype(int), COLOURS, strict=True):
        image[box[1] : box[3], box[0] : box[2]] = colour
    return image


def saved(tmp_path: Path, *transforms, **options) -> str:
    path = tmp_path / "mine.yaml"
    A.save(A.Compose(list(transforms), **options), path, data_format="yaml")
    return str(path)


def run(augmentation, seed: int):
    return augmentation(a_scene(), BOXES, LABELS, seed)


@pytest.mark.parametrize("name", PRESETS)
def test_equal_seeds_give_equal_results_in_any_order_and_process(name):
    one, other = build_augmentation(name), pickle.loads(pickle.dumps(build_augmentation(name)))
    forward = {seed: run(one, seed) for seed in range(12)}
    backward = {seed: run(other, seed) for seed in reversed(range(12))}
    for seed in range(12):
        for left, right in zip(forward[seed], backward[seed], strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"none", "flip"}))
def test_different_seeds_differ(name):
    augmentation = build_augmentation(name)
    assert len({run(augmentation, seed)[0].tobytes() for seed in range(20)}) > 10


def test_the_arguments_are_left_as_they_are():
    image, boxes, labels = a_scene(), BOXES.copy(), LABELS.copy()
    for seed in range(5):
        build_augmentation("ssd")(image, boxes, labels, seed)
    np.testing.assert_array_equal(image, a_scene())
    np.testing.assert_array_equal(boxes, BOXES)
    np.testing.assert_array_equal(labels, LABELS)


def test_none_changes_nothing():
    image, boxes, labels = run(build_augmentation("none"), 3)
    np.testing.assert_array_equal(image, a_scene())
    np.testing.assert_allclose(boxes, BOXES, atol=1e-4)
    np.testing.assert_array_equal(labels, LABELS)


def test_a_flip_mirrors_half_open_boxes():
    results = [run(build_augmentation("flip"), seed) for seed in range(10)]
    flipped = [boxes for image, boxes, _ in results if (image == a_scene()[:, ::-1]).all()]
    assert 0 < len(flipped) < 10
    np.testing.assert_allclose(flipped[0], [[70, 30, 120, 80], [10, 60, 40, 110]], atol=1e-4)


def test_flip_and_colour_are_independent_and_each_has_its_probability(tmp_path):
    augmentation = build_augmentation(
        saved(
            tmp_path,
            A.HorizontalFlip(p=0.5),
            A.InvertImg(p=0.5),
            A.OneOf([A.VerticalFlip(), A.NoOp()], p=1.0),
        )
    )
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = 10  # the corner tells both flips, its value the inversion
    n, fired = 1500, []
    for seed in range(n):
        out = augmentation(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), seed)[0][
            ..., 0
        ].astype(int)
        inverted = out.max() > 200
        y, x = np.argwhere(out == (245 if inverted else 10))[0]
        fired.append((x, inverted, y))
    fired = np.array(fired, float)
    np.testing.assert_allclose(fired.mean(axis=0), 0.5, atol=4 * 0.5 / np.sqrt(n))
    correlation = np.corrcoef(fired.T)
    assert np.abs(correlation[~np.eye(3, dtype=bool)]).max() < 4 / np.sqrt(n)


def test_a_transform_decides_alike_whatever_stands_before_it(tmp_path):
    def flips(first) -> list[bool]:
        augmentation = build_augmentation(saved(tmp_path, first, A.HorizontalFlip(p=0.5)))
        return [run(augmentation, seed)[1][0, 0] != BOXES[0, 0] for seed in range(40)]

    assert flips(A.NoOp()) == flips(A.GaussNoise(p=1.0)) == flips(A.InvertImg(p=0.3))


@pytest.mark.parametrize("name", PRESETS)
def test_boxes_stay_on_their_objects(name):
    """The colour at a box's middle tells which object it is; hue moves by 18 degrees at most."""
    augmentation = build_augmentation(name)
    seen = 0
    for seed in range(60):
        image, boxes, labels = run(augmentation, seed)
        assert image.dtype == np.uint8
        assert (boxes.dtype, labels.dtype) == (np.float32, np.int64)
        assert len(boxes) == len(labels)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= image.shape[1::-1]).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 0.99).all()
        for box, label in zip(boxes, labels, strict=True):
            x, y = (box[:2] + box[2:]).astype(int) // 2
            pixel = image[y, x].astype(int)
            assert pixel.argmax() == label - 1
            seen += 1
    assert seen > 60


def test_boxes_are_tight_after_zooming():
    augmentation = build_augmentation("multiscale")
    for seed in range(40):
        image, boxes, labels = run(augmentation, seed)
        for box, label in zip(boxes, labels, strict=True):
            lead, other = image[..., label - 1].astype(int), image[..., 2 - label].astype(int)
            y, x = np.nonzero(lead - other > 127)
            found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_allclose(box, found, atol=1.01)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((0, 0, 160, 120), (7, 11, 87, 71)),
        ((0, 0, 160, 120), (0, 0, 159, 119)),
        ((0, 0, 160, 120), (159, 119, 160, 120)),
        ((30, 20, 110, 80), (0, 0, 160, 120)),
        ((0, 0, 160, 120), (0, 0, 160, 120)),
    ],
)
def test_a_zoom_scales_a_window_of_the_image_into_one_of_a_canvas_of_mean_colour(source, target):
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    part, canvas = image[source[1] : source[3], source[0] : source[2]], np.full_like(image, MEAN_COLOUR)
    size = target[2] - target[0], target[3] - target[1]
    how = cv2.INTER_AREA if size[0] < part.shape[1] else cv2.INTER_LINEAR
    canvas[target[1] : target[3], target[0] : target[2]] = cv2.resize(part, size, interpolation=how)
    np.testing.assert_array_equal(Zoom((0.5, 2.0)).apply(image, source, target), canvas)


@pytest.mark.parametrize("name", PRESETS)
def test_images_without_objects_are_fine(name):
    augmentation = build_augmentation(name)
    for seed in range(10):
        _, boxes, labels = augmentation(a_scene(), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), seed)
        assert boxes.shape == (0, 4)
        assert labels.shape == (0,)
        assert (boxes.dtype, labels.dtype) == (np.float32, np.int64)


def test_a_box_that_is_hardly_visible_is_dropped_with_its_label(tmp_path):
    crop = build_augmentation(saved(tmp_path, A.Crop(0, 0, 128, 120, p=1.0)))
    _, boxes, labels = run(crop, 0)  # 8 of the second box's 30 columns are left
    np.testing.assert_allclose(boxes, BOXES[:1], atol=1e-4)
    assert labels.tolist() == [1]


def test_a_file_may_set_its_own_visibility_but_not_the_format(tmp_path):
    params = A.BboxParams(format="coco", label_fields=["x"], min_visibility=0.2)
    crop = build_augmentation(saved(tmp_path, A.Crop(0, 0, 128, 120, p=1.0), bbox_params=params))
    _, boxes, labels = run(crop, 0)
    np.testing.assert_allclose(boxes, [[40, 30, 90, 80], [120, 60, 128, 110]], atol=1e-4)
    assert labels.tolist() == [1, 2]


def test_a_file_without_geometry_is_accepted(tmp_path):
    augmentation = build_augmentation(saved(tmp_path, A.InvertImg(p=1.0)))
    np.testing.assert_array_equal(run(augmentation, 0)[0], 255 - a_scene())


def test_an_unknown_name_is_told_with_the_closest():
    with pytest.raises(UserError) as caught:
        build_augmentation("multi")
    assert str(caught.value) == (
        f"data.augment: must be one of {', '.join(PRESETS)} or an albumentations file, "
        "got 'multi'; closest: 'multiscale'"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "TypeError"),
        ("a: [", "ParserError"),
        (
            "transform: {__class_fullname__: Compose, transforms: [{__class_fullname__: Flipp, p: 1}]}",
            "Flipp",
        ),
        (f"{_COMPOSE}, transforms: [{{__class_fullname__: HorizontalFlip, p: 1, chance: 2}}]}}", "'chance'"),
        (f"{_COMPOSE}, transforms: [{{__class_fullname__: HorizontalFlip, p: 7}}]}}", "equal to 1"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, text, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        build_augmentation(str(path))
    assert str(caught.value).startswith(f"{path}: must be a pipeline that albumentations.save wrote, got ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipeline_that_normalizes_is_refused_when_it_is_built(tmp_path):
    with pytest.raises(
        UserError, match=r"image must stay uint8 \[H, W, 3\], got float32 \[480, 640, 3\]; leave"
    ):
        build_augmentation(saved(tmp_path, A.Normalize(p=1.0)))


def test_a_users_pipeline_that_fails_names_its_file_and_the_image(tmp_path):
    path = saved(tmp_path, A.RandomCrop(height=200, width=200, p=1.0))
    with pytest.raises(UserError, match=f"{path}: must work on 160x120 images, got "):
        run(build_augmentation(path), 0)


def test_seeds_do_not_change_between_runs_or_depend_on_how_parts_are_joined():
    assert derive_seed("augment", 0, 1, 2) == 15701166389371904060
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, 2) != derive_seed(1, 2, 0)


def windows_of_padded(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of the image's size out of the image with a black border of 4 pixels, and its mirror."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = {(y, x): padded[y : y + height, x : x + width] for y in range(9) for x in range(9)}
    found = {crop.tobytes(): (*place, False) for place, crop in crops.items()}
    return found | {crop[:, ::-1].tobytes(): (*place, True) for place, crop in crops.items()}


@pytest.mark.parametrize("shape", [(32, 32), (9, 14)])
def test_cifar_gives_every_crop_of_the_padded_image_and_its_mirror_equally_often(shape):
    image = np.random.default_rng(0).integers(1, 256, (*shape, 3), np.uint8)
    augmentation, expected = build_augmentation("cifar"), windows_of_padded(image)
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    n = 2000
    drawn = [expected[augmentation(image, *empty, seed)[0].tobytes()] for seed in range(n)]
    assert len(set(drawn)) > 155  # of 162
    y, x, mirrored = np.array(drawn, float).T
    for shift in (y, x):
        counts = np.bincount(shift.astype(int), minlength=9)
        assert np.abs(counts - n / 9).max() < 4 * np.sqrt(n / 9)
    assert np.abs(np.corrcoef([y, x, mirrored])[~np.eye(3, dtype=bool)]).max() < 4 / np.sqrt(n)
    assert abs(mirrored.mean() - 0.5) < 2 / np.sqrt(n)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("shape", [(64, 64), (50, 120), (1, 1), (300, 8)])
def test_imagenet_gives_images_of_one_size_from_any(size, shape):
    augmentation = build_augmentation("imagenet", image_size=size)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for seed in range(10):
        out = augmentation(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), seed)[0]
        assert (out.shape, out.dtype) == ((size, size, 3), np.uint8)


def test_imagenet_sees_8_to_100_percent_of_the_area_at_3_to_4_through_4_to_3():
    """The slopes of a ramp in the result tell what part of the image it shows."""
    y, x = np.mgrid[:200, :200].astype(np.uint8)
    image = np.stack([x, y, np.zeros_like(x)], axis=2)
    augmentation = build_augmentation("imagenet", image_size=64)
    areas, ratios, mirrored = [], [], []
    for seed in range(400):
        out = augmentation(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), seed)[0].astype(float)
        width, height = (out[32, -5, 0] - out[32, 4, 0]) * 64 / 55, (out[-5, 32, 1] - out[4, 32, 1]) * 64 / 55
        mirrored.append(width < 0)
        areas.append(abs(width) * height / 200**2)
        ratios.append(abs(width) / height)
    assert 0.07 < min(areas) < 0.13
    assert 0.9 < max(areas) < 1.03
    assert 0.71 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert 0.4 < np.mean(mirrored) < 0.6


def test_the_image_size_changes_imagenet_alone():
    assert run(build_augmentation("imagenet"), 0)[0].shape == (224, 224, 3)
    for name in sorted(set(PRESETS) - {"imagenet"}):
        for left, right in zip(
            run(build_augmentation(name), 1), run(build_augmentation(name, 64), 1), strict=True
        ):
            np.testing.assert_array_equal(left, right)


def test_imagenet_averages_where_it_shrinks_and_does_not_sample_a_few_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    augmentation = build_augmentation("imagenet", image_size=16)
    for seed in range(10):
        out = augmentation(noise, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), seed)[0]
        assert out.std() < 25  # at least 20 pixels are in one; of single ones it is 74
