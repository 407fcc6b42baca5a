"""Pictures of detections: what is drawn where, and nothing a detector can say makes it fail."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lbdet.classes import COCO80, VOC20
from lbdet.metrics import diff_detections
from lbdet.report.draw import KEPT, LOST, NEW, class_colour, draw_detections, draw_pair
from lbdet.report.font import load_font

GREY = np.full((600, 800, 3), 128, np.uint8)
TITLES = ("float32", "W4")


def found(boxes=(), labels=None, scores=None):
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array([1] * len(boxes) if labels is None else labels, np.int64),
        "scores": np.array([0.9] * len(boxes) if scores is None else scores, np.float32),
    }


def is_colour(picture, colour):
    return (np.asarray(picture) == colour).all(axis=-1)


def pair(image, left, right):
    return draw_pair(image, left, right, diff_detections(left, right), VOC20, TITLES)


def halves(picture):
    """The left and the right image of a pair of GREY, without what stands above and between."""
    pixels = np.asarray(picture)[-GREY.shape[0] :]
    return pixels[:, : GREY.shape[1]], pixels[:, -GREY.shape[1] :]


def test_a_box_is_outlined_in_its_class_colour_along_its_inner_edge():
    pixels = is_colour(draw_detections(GREY, found([[100, 200, 300, 400]], [3]), VOC20), class_colour(3))
    for line in (pixels[250:390, 100], pixels[250:390, 299], pixels[399, 110:290], pixels[200, 290]):
        assert line.all()
    assert not pixels[203:397, 103:297].any()  # nothing inside
    assert not pixels[400:].any()
    assert not pixels[:, :99].any()


def test_the_label_stands_on_its_box_with_text_in_it():
    picture = np.asarray(draw_detections(GREY, found([[100, 200, 300, 400]], [3]), VOC20))
    label = picture[175:198, 105:160]
    assert is_colour(label, class_colour(3)).mean() > 0.5
    assert (label.sum(axis=-1) < 150).mean() > 0.1


def test_a_colour_belongs_to_a_label_and_is_light_enough_for_dark_text():
    colours = np.array([class_colour(label) for label in range(1, 91)])
    assert len(np.unique(colours, axis=0)) == 90
    assert colours.min() >= 0
    assert colours.max() <= 255
    assert (colours @ (0.299, 0.587, 0.114)).min() > 125
    neighbours = np.abs(np.diff(colours[:20], axis=0)).sum(axis=1)
    assert neighbours.min() > 150


def test_labels_give_way_to_each_other_and_stay_inside():
    shifted = [
        [100, 200, 300, 400],
        [110, 210, 310, 410],
        [90, 190, 290, 390],
        [700, 0, 900, 20],
        [-50, 590, 5, 700],
    ]
    labels = [1, 2, 3, 4, 5]
    everything = np.asarray(draw_detections(GREY, found(shifted, labels, [0.9, 0.8, 0.7, 0.6, 0.5]), VOC20))
    for box, label in zip(shifted, labels, strict=True):
        alone = is_colour(draw_detections(GREY, found([box], [label]), VOC20), class_colour(label)).sum()
        assert alone > 1000  # a whole label is visible, also when little of the box is
        assert is_colour(everything, class_colour(label)).sum() > 0.75 * alone


def test_what_became_of_a_detection_is_seen_in_its_colour_and_line():
    kept, lost, new = [50, 100, 250, 300], [300, 100, 500, 300], [550, 350, 750, 550]
    picture = pair(GREY, found([kept, lost]), found([new, kept]))
    left, right = halves(picture)
    for half, box, style in ((left, kept, KEPT), (left, lost, LOST), (right, kept, KEPT), (right, new, NEW)):
        bottom = is_colour(half, style.colour)[box[3] - 1, box[0] : box[2]]
        assert bottom.all() == (style == KEPT)
        assert 0.4 < bottom.mean() <= 1
    assert not is_colour(right, LOST.colour).any()
    assert not is_colour(left, NEW.colour).any()


def test_the_better_score_lies_on_top():
    box = [100, 200, 300, 400]
    picture = draw_detections(GREY, found([box, box, box], [1, 2, 3], [0.5, 0.9, 0.7]), VOC20)
    assert is_colour(picture, class_colour(2))[320:370, 100].all()


def test_a_change_lies_over_what_was_kept():
    box = [100, 200, 300, 400]
    left, _ = halves(pair(GREY, found([box, box], [1, 2], [0.2, 0.9]), found([box], [2], [0.9])))
    assert not is_colour(left, KEPT.colour)[320:370, 100].any()
    assert is_colour(left, LOST.colour)[320:370, 100].mean() > 0.4


def test_the_strip_shows_the_counts_in_the_same_colours():
    picture = np.asarray(pair(GREY, found(), found()))
    strip, middle = picture[: -GREY.shape[0]], picture.shape[1] // 2
    assert picture.shape[0] > GREY.shape[0]
    assert picture.shape[1] > 2 * GREY.shape[1]
    shown = [
        [is_colour(side, s.colour).any() for s in (KEPT, LOST, NEW)]
        for side in np.split(strip, [middle], axis=1)
    ]
    assert shown == [[True, True, False], [True, False, True]]
    one_more = np.asarray(pair(GREY, found(), found([[10, 10, 90, 90]])))[: -GREY.shape[0]]
    np.testing.assert_array_equal(strip[:, :middle], one_more[:, :middle])
    assert (strip[:, middle:] != one_more[:, middle:]).any()


@pytest.mark.parametrize("shape", [(600, 800), (100, 60), (30, 1000), (1000, 3), (1, 1), (1, 5000)])
def test_any_size_of_image_can_be_drawn_and_small_ones_are_enlarged(shape):
    image = np.full((*shape, 3), 200, np.uint8)
    sample = found([[0, 0, shape[1], shape[0]], [0, 0, 1, 1]], [15, 8])
    picture = draw_detections(image, sample, VOC20)
    assert max(picture.size) == max(640, *shape)
    assert picture.width / picture.height == pytest.approx(
        shape[1] / shape[0], rel=0.01 if min(shape) > 10 else 1
    )
    assert pair(image, sample, found()).height > picture.height


def test_boxes_of_an_enlarged_image_are_enlarged_with_it():
    picture = draw_detections(np.zeros((160, 320, 3), np.uint8), found([[100, 50, 200, 100]], [3]), VOC20)
    pixels = is_colour(picture, class_colour(3))
    assert picture.size == (640, 320)
    assert pixels[199, 210:390].all()
    assert pixels[110:190, 399].all()


@pytest.mark.parametrize(
    "box",
    [[-90, -90, -10, -10], [900, 10, 950, 20], [10, 700, 20, 1e30], [800, 0, 900, 10], [-10, 0, 0, 10]],
)
def test_a_box_outside_the_image_is_not_drawn(box):
    np.testing.assert_array_equal(draw_detections(GREY, found([box]), VOC20), GREY)


@pytest.mark.parametrize(
    "box", [[50, 300, 51, 301], [50, 300, 50, 300], [60, 310, 50, 300], [-9, -9, 9e9, 9e9]]
)
def test_a_box_of_no_size_or_reaching_outside_has_a_label(box):
    pixels = is_colour(draw_detections(GREY, found([box]), VOC20), class_colour(1))
    assert pixels.sum() > 500


def test_no_detections_leave_the_image_as_it_is_and_the_input_is_not_written_to():
    image = GREY.copy()
    np.testing.assert_array_equal(draw_detections(image, found(), VOC20), GREY)
    draw_detections(image, found([[0, 0, 100, 100]]), VOC20)
    np.testing.assert_array_equal(image, GREY)


def test_hundreds_of_boxes_are_drawn_in_reasonable_time():
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(-50, 700, (500, 2)), rng.uniform(1, 300, (500, 2))
    sample = found(np.concatenate([corner, corner + size], axis=1), rng.integers(1, 81, 500), rng.random(500))
    start = time.perf_counter()
    draw_detections(GREY, sample, COCO80)
    assert time.perf_counter() - start < 10  # about .3 s on an idle core


@pytest.mark.parametrize(
    "name", ["x" * 500, "Straßenbahn", "猫", "", "two\nlines", "\u202eright to left", "🐕"]
)
def test_any_class_name_can_be_drawn(name):
    sample = found([[100, 200, 300, 400]])
    picture = draw_detections(GREY, sample, [name])
    assert picture.size == (800, 600)
    assert is_colour(picture, class_colour(1)).sum() > 1500
    assert (
        draw_pair(GREY, sample, found(), diff_detections(sample, found()), [name], (name, name)).width > 1600
    )


@pytest.mark.parametrize("name", ["κουτί", "собака"])
def test_letters_outside_ascii_are_letters_and_not_the_box_of_an_unknown_sign(name):
    box = bytes(load_font(20).getmask("\uffff"))
    assert box not in [bytes(load_font(20).getmask(letter)) for letter in name]
    drawn = [
        np.asarray(draw_detections(GREY, found([[9, 99, 300, 400]]), [n]))
        for n in (name, "\uffff" * len(name))
    ]
    assert (drawn[0] != drawn[1]).any()


def test_a_name_too_long_for_the_image_is_cut_but_its_score_stays():
    short, long = (
        np.asarray(draw_detections(GREY, found([[0, 300, 9, 309]]), [name])) for name in ("x", "x" * 500)
    )
    label = is_colour(long, class_colour(1))[290]
    assert label[760:798].any()
    digit = (short[280:299].sum(axis=-1) < 150).any()  # the score is dark on light in both
    assert digit
    assert (long[280:299, 750:798].sum(axis=-1) < 150).any()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3)),
        np.zeros((0, 9, 3), np.uint8),
    ],
)
def test_an_image_of_another_kind_is_refused(image):
    with pytest.raises(ValueError, match=r"image: must be uint8 \[H, W, 3\], got (uint8|float64) \["):
        draw_detections(image, found(), VOC20)


def test_a_label_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"labels: must lie in 1..2, got 1..3"):
        draw_detections(GREY, found([[0, 0, 9, 9]] * 2, [1, 3]), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"labels: must lie in 1..2, got 0..0"):
        draw_detections(GREY, found([[0, 0, 9, 9]], [0]), ["cat", "dog"])
