"""`visualize.py`: pictures of a user's own photographs, never at their cost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbdet.cli import train_det, visualize


@pytest.fixture
def photos(devkit, tmp_path) -> Path:
    """A folder with two photographs and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(2):
        shutil.copy(devkit / f"VOC2012/JPEGImages/val_0000{k}.jpg", folder / f"{k}.jpg")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def draw(call, finished_run, tmp_path):
    def run(*images: object, options: Sequence[object] = ()):
        arguments = ["--run", finished_run, "--output", tmp_path / "drawn", "--threshold", "0.1"]
        return call(visualize.main, *arguments, *options, "--images", *images)

    return run


def names(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "drawn").iterdir())


def test_a_folder_gives_a_picture_for_each_photograph_with_its_count(draw, photos, tmp_path):
    result = draw(photos)
    assert result.code == 0
    assert names(tmp_path) == ["0.png", "1.png"]
    assert re.search(r"0\.png: \d+ detections", result.out)
    assert Image.open(tmp_path / "drawn/0.png").size == (640, 533)


def test_the_threshold_decides_what_is_drawn(draw, photos, tmp_path):
    counts = [
        int(re.search(r"0\.png: (\d+) det", draw(photos, options=["--threshold", t]).out)[1])
        for t in (0, 0.1, 1)
    ]
    assert counts[0] > counts[2] == 0
    assert counts[0] >= counts[1]


def test_a_pair_is_side_by_side_with_counts_that_add_up(draw, photos, tmp_path):
    alone = draw(photos).out
    result = draw(photos, options=["--against", "float"])
    assert result.code == 0
    assert Image.open(tmp_path / "drawn/0.png").width > 2 * 640
    lines = re.findall(r"(\S+png): kept (\d+), lost (\d+), new (\d+)", result.out)
    assert len(lines) == 2
    total = re.search(r"2 images: kept (\d+), lost (\d+), new (\d+)", result.out)
    assert [int(x) for x in total.groups()] == [sum(int(line[k]) for line in lines) for k in (1, 2, 3)]
    for path, kept, _, new in lines:
        drawn_alone = int(re.search(re.escape(path) + r": (\d+) detections", alone)[1])
        assert int(kept) + int(new) == drawn_alone


@pytest.mark.parametrize("itself", ["W4", "{run}"])
def test_against_itself_everything_is_kept(draw, photos, finished_run, itself):
    result = draw(photos, options=["--against", itself.format(run=finished_run)])
    assert re.search(r"2 images: kept [1-9]\d*, lost 0, new 0", result.out)


def test_against_float_says_whose_weights_these_are(draw, photos, finished_run):
    note = "float*: this run's weights unrounded; for a float detector give a float run to --against"
    assert note in draw(photos, options=["--against", "float"]).out
    assert "float*" not in draw(photos, options=["--against", finished_run]).out


def test_files_of_the_same_name_get_pictures_of_their_own(draw, photos, tmp_path):
    (photos / "more").mkdir()
    for name in ("0.png", "more/0.jpg", "more/0_2.jpg"):
        Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(photos / name)
    assert draw(photos, photos / "more", photos / "0.jpg").code == 0
    assert len(names(tmp_path)) == 6
    assert {"0.png", "0_2.png", "0_3.png"} <= set(names(tmp_path))


def test_a_photograph_is_drawn_upright(draw, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    path = tmp_path / "turned.jpg"
    Image.fromarray(np.zeros((60, 120, 3), np.uint8)).save(path, exif=exif)
    assert draw(path).code == 0
    assert Image.open(tmp_path / "drawn/turned.png").size == (320, 640)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK", "LA"])
def test_pictures_of_all_modes_are_drawn(draw, tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    grey = (
        Image.fromarray(np.full((40, 50), 1000, np.uint16)) if mode == "I;16" else Image.new(mode, (50, 40))
    )
    grey.save(path)
    assert draw(path).code == 0


def test_a_picture_of_one_pixel_is_drawn(draw, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert draw(tmp_path / "dot.png").code == 0


def test_a_damaged_photograph_is_told_by_name(draw, photos, tmp_path):
    whole = (photos / "1.jpg").read_bytes()
    (photos / "1.jpg").write_bytes(whole[: len(whole) // 2])
    result = draw(photos)
    assert result.code == 2
    assert f"error: {photos / '1.jpg'}: must be a whole JPEG or PNG image, got" in result.err


def test_photographs_are_never_overwritten(draw, photos, call, finished_run):
    Image.new("RGB", (20, 20)).save(photos / "mine.png")
    before = (photos / "mine.png").read_bytes()
    result = call(visualize.main, "--run", finished_run, "--images", photos, "--output", photos)
    assert result.code == 2
    assert f"--output: must not be where the images are, {photos / 'mine.png'} would be lost" in result.err
    assert (photos / "mine.png").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1.5"], "--threshold: must lie in [0, 1], got 1.5"),
        (["--threshold", "nan"], "--threshold: must lie in [0, 1], got nan"),
        (["--against", "flaot"], "--against: must be a run's folder or a precision like float, got 'flaot'"),
        (["--against", "W9"], "--against: "),
        (["--run", "/nowhere"], "/nowhere: must be the folder of a run, got no config.yaml in it"),
        (["--output", "{photos}/0.jpg"], "0.jpg: cannot be made: File exists"),
    ],
)
def test_a_mistake_is_told(draw, photos, options, message):
    result = draw(photos, options=[option.format(photos=photos) for option in options])
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("missing", ["nothing.jpg", "empty"])
def test_images_that_are_not_there_are_told(draw, tmp_path, missing):
    (tmp_path / "empty").mkdir()
    result = draw(tmp_path / missing)
    assert result.code == 2
    assert f"--images: {tmp_path / missing} " in result.err
    assert not (tmp_path / "drawn").exists()


def test_an_address_is_no_image(draw):
    message = "error: --images: must be local files, got 'https://a.org/b.jpg'; download it first\n"
    assert draw("https://a.org/b.jpg").err == message


def test_a_run_with_other_classes_is_no_reference(draw, photos, config, tmp_path, call, finished_run):
    settings = ["train.max_steps=0", "data.classes=[square, disc, triangle, star, ring, cross]"]
    call(train_det.main, "--config", config, "--output", tmp_path / "other", "--set", *settings)
    result = draw(photos, options=["--against", tmp_path / "other"])
    assert result.code == 2
    assert f"{tmp_path / 'other'} must have the classes of {finished_run}, got square, disc" in result.err


def test_low_bit_activations_are_calibrated_on_the_photographs(draw, photos, tmp_path):
    result = draw(photos, options=["--against", "W4A8"])
    assert result.code == 0
    assert "activations calibrated on 2 of these images" in result.out
    assert names(tmp_path) == ["0.png", "1.png"]
