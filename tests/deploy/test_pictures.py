"""Every image that a user may have becomes upright RGB, or is refused in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fuzz.guards import in_time
from PIL import EpsImagePlugin, Image

from lbdet import images
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


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B"]
)
def test_every_mode_becomes_rgb_of_the_same_colours(mode):
    colour = (200, 200, 200) if mode[0] in "LI" else (255, 255, 255) if mode == "1" else (204, 102, 51)
    image = Image.new("RGB", (7, 5), colour)
    if mode.startswith("I"):
        grey = np.full((5, 7), 200 if mode == "I" else 200 << 8, np.int32 if mode == "I" else np.uint16)
        image = Image.frombytes(mode, (7, 5), (grey.byteswap() if mode == "I;16B" else grey).tobytes())
    elif mode == "PA":
        image = image.convert("P").convert("PA")
    else:
        image = image.convert(mode)
    found = read_picture(image)
    assert (image.mode, found.shape) == (mode, (5, 7, 3))
    assert np.abs(found.astype(int) - colour).max() <= 4


def test_floats_as_pixels_are_refused():
    with pytest.raises(UserError, match=r"^image: image must have whole numbers as pixels, got floats"):
        read_picture(Image.new("F", (7, 5), 0.5))


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
    for name, form in (("a.gif", "GIF"), ("a.tif", "TIFF"), ("a.jpg", "MPO")):
        frames[0].save(tmp_path / name, form, save_all=True, append_images=frames[1:])
        assert (read_picture(tmp_path / name)[0, 0] > 200).tolist() == [True, False, False]


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
    for name in ("none.jpg", "a\0.jpg"):
        with pytest.raises(UserError, match=r"\.jpg: image file does not exist"):
            read_picture(str(tmp_path / name))
    for name in ("cut.jpg", "text.jpg", "empty.png"):
        message = rf"{name}: must be a whole JPEG, PNG, BMP, WEBP, GIF or TIFF image, got "
        with pytest.raises(UserError, match=message):
            read_picture(tmp_path / name)
    with pytest.raises(UserError, match=r"must be an image file, got a folder, a pipe or a device"):
        read_picture(tmp_path)
    with pytest.raises(UserError, match=r"^image: must be a whole image, got "):
        read_picture(Image.open(tmp_path / "cut.jpg"))


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with in_time(5), pytest.raises(UserError, match=r"a\.jpg: must be an image file, got a folder, a pipe"):
        read_picture(tmp_path / "a.jpg")


def test_postscript_under_an_images_name_is_refused_and_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was started"))
    saved(tmp_path / "a.eps", Image.fromarray(gradient())).rename(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: must be a whole .*, got another kind of file"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("tag", [0x00, 0x1A])
def test_exif_of_impossible_values_is_a_damaged_file(tmp_path, suffix, tag):
    """PIL raises struct.error where the width is text, and TypeError where the resolution is."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = bytearray(saved(tmp_path / f"a.{suffix}", Image.fromarray(gradient()), exif=exif).read_bytes())
    first = next(content.index(mark) + 8 for mark in (b"MM\0*", b"II*\0") if mark in content)
    content[first + 3] = tag  # 0x010F becomes 0x0100, the width, or 0x011A, the resolution
    (tmp_path / f"b.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"b\.{suffix}: must be a whole .*, got "):
        read_picture(tmp_path / f"b.{suffix}")


def test_an_absurdly_large_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(gradient()))
    monkeypatch.setattr(images, "MAX_PIXELS", 2399)
    monkeypatch.setattr(images, "_to_rgb", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=r"a\.png: image must have 1 to 2399 pixels, got 60x40"):
        read_picture(path)
