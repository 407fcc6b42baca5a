"""Every image that a user may have becomes upright RGB, or is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbdet.deploy.pictures import read_picture
from lbdet.errors import UserError


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 4, x * 4, (x + y) * 2], -1).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["array", "pil", "path", "text"])
def test_arrays_pil_images_and_paths_are_the_same_picture(tmp_path, kind):
    pixels = gradient()
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    picture = {"array": pixels, "pil": Image.fromarray(pixels), "path": path, "text": str(path)}[kind]
    found = read_picture(picture)
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (7, 5))
    assert read_picture(image).shape == (5, 7, 3)


def test_grey_is_grey_and_a_palette_gives_its_colours(tmp_path):
    grey = Image.fromarray(np.full((4, 4), 77, np.uint8))
    assert (read_picture(grey) == 77).all()
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (read_picture(saved(tmp_path / "p.png", palette)) == [10, 20, 30]).all()


def test_16_bit_grey_loses_its_lower_byte(tmp_path):
    image = Image.fromarray(np.full((3, 3), 200 * 256 + 17, np.uint16))
    assert (read_picture(saved(tmp_path / "a.png", image)) == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(tmp_path, orientation):
    upright = Image.fromarray(gradient())
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", stored, exif=exif)
    np.testing.assert_array_equal(read_picture(path), gradient())


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif", "tiff"])
def test_the_formats_of_folders_can_be_read(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(gradient()))
    assert np.abs(read_picture(path).astype(int) - gradient()).mean() < 20


def test_of_several_frames_the_first_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (read_picture(path)[0, 0] > 200).tolist() == [True, False, False]


def test_one_pixel_is_a_picture():
    assert read_picture(Image.new("L", (1, 1))).shape == (1, 1, 3)


def test_a_view_becomes_contiguous():
    view = gradient()[:, ::-1]
    found = read_picture(view)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, view)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_with_their_shape(array):
    with pytest.raises(
        UserError, match=r"^image: an array must be uint8 \[H, W, 3\] with pixels, got \w+ \["
    ):
        read_picture(array)


def test_files_that_are_missing_folders_text_or_cut_are_refused_by_name(tmp_path):
    saved(tmp_path / "whole.jpg", Image.fromarray(gradient(200, 200)))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-2000])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none\.jpg: image file does not exist"):
        read_picture(tmp_path / "none.jpg")
    for name in ("cut.jpg", "text.jpg", "empty.png", ""):
        with pytest.raises(UserError, match=rf"{name}: must be a whole image file"):
            read_picture(tmp_path / name)


def test_an_absurdly_large_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(gradient()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png: image must have at most 1000 pixels, got more"):
        read_picture(path)
