"""Decoding: every mode becomes RGB, every damage an error."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
from fuzz.guards import in_time
from PIL import Image

from lbdet import images
from lbdet.data.images import read_image
from lbdet.errors import UserError
from lbdet.images import check_pixels, rgb_pixels

COLOUR = (200, 100, 50)


def saved(path, mode: str, **options):
    Image.new("RGB", (6, 4), COLOUR).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.png"), ("L", "a.png"), ("1", "a.png"), ("LA", "a.png"),
     ("RGB", "a.jpg"), ("L", "a.jpg"), ("CMYK", "a.jpg")],
)  # fmt: skip
def test_every_mode_becomes_uint8_rgb(tmp_path, mode, name):
    image = read_image(saved(tmp_path / name, mode))
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    if mode in ("RGB", "RGBA", "CMYK"):
        assert np.abs(image.astype(int) - COLOUR).max() <= 4
    if mode == "L":
        assert (image[..., 0] == image[..., 2]).all()


def test_16_bit_grey_keeps_its_upper_byte(tmp_path):
    Image.fromarray(np.full((4, 6), 0x7FAB, np.uint16)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 0x7F).all()


@pytest.mark.parametrize(
    "stored, expected",
    [([0, 77, 200, 255], [0, 77, 200, 255]), ([0, 255, 40000, 65535], [0, 0, 156, 255]), ([0], [0])],
)
def test_32_bit_grey_is_8_bit_or_16_bit_grey_as_its_largest_pixel_tells(stored, expected):
    found = rgb_pixels(Image.fromarray(np.array([stored], np.int32)), "a")
    assert found[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize("stored", [[-1, 5], [3, 65536]])
def test_32_bit_grey_of_another_range_is_refused(stored):
    image, got = Image.fromarray(np.array([stored], np.int32)), rf"{stored[0]}\.\.{stored[1]}"
    with pytest.raises(UserError, match=rf"^a: grey pixels must lie in 0\.\.65535, got {got}; save it in 8"):
        rgb_pixels(image, "a")


def test_floats_as_pixels_are_refused():
    with pytest.raises(UserError, match=r"^a: image must have whole numbers as pixels, got floats; save it"):
        rgb_pixels(Image.fromarray(np.full((4, 6), 0.5, np.float32)), "a")


def test_orientation_is_applied_only_when_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = saved(tmp_path / "a.jpg", "RGB", exif=exif)
    assert read_image(path).shape == (4, 6, 3)
    assert read_image(path, exif=True).shape == (6, 4, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_truncated_image_is_an_error_that_names_the_file(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{path}: must be a whole JPEG or PNG image, got "):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff"])
def test_a_file_that_is_no_image_is_an_error(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a.jpg: must be a whole JPEG or PNG image, got "):
        read_image(tmp_path / "a.jpg")


def test_a_cut_profile_behind_the_pixels_is_a_damaged_file(tmp_path):
    data = saved(tmp_path / "a.png", "RGB").read_bytes()
    chunk = b"iCCPa\0"
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data.replace(data[-12:], chunk + data[-12:]))
    with pytest.raises(UserError, match="must be a whole JPEG or PNG image, got index out of range"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("error", [struct.error("x"), MemoryError(), RuntimeError("\n" + "x" * 999)])
def test_whatever_a_decoder_raises_is_a_damaged_file_in_one_short_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(UserError, match=r"a.png: must be a whole JPEG or PNG image, got ") as caught:
        read_image(saved(tmp_path / "a.png", "RGB"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"b.jpg: image file does not exist"):
        read_image(tmp_path / "b.jpg")
    with pytest.raises(UserError, match="must be a whole JPEG or PNG image, got "):
        read_image(tmp_path)
    with pytest.raises(UserError, match="must be a whole JPEG or PNG image, got embedded null byte"):
        read_image("a\0.jpg")


def test_more_pixels_than_the_limit_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", "RGB")  # 24 pixels
    monkeypatch.setattr(images, "MAX_PIXELS", 24)
    assert read_image(path).size == 72
    monkeypatch.setattr(images, "MAX_PIXELS", 23)
    with pytest.raises(UserError, match=f"^{path}: image must have 1 to 23 pixels, got 6x4"):
        read_image(path)


def test_a_bomb_that_pil_refuses_itself_is_told_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL raises above twice the limit
    with pytest.raises(
        UserError, match=r"a.png: image must have 1 to 89478485 pixels, got far more; make it"
    ):
        read_image(saved(tmp_path / "a.png", "RGB"))


def test_a_size_that_no_image_has_is_refused():
    check_pixels("x", 1 << 24, 1)
    for width, height in ((0, 5), (5, 0), (-1, -1), ((1 << 24) + 1, 1), (1, (1 << 24) + 1), (10_000, 10_000)):
        with pytest.raises(UserError, match=f"x: image must have 1 to 89478485 pixels, got {width}x{height}"):
            check_pixels("x", width, height)


def test_a_size_of_thousands_of_digits_is_told_in_short():
    with pytest.raises(UserError, match="x: image must have 1 to 89478485 pixels, got 9999") as error:
        check_pixels("x", 10**4000 - 1, 10**5000)
    assert len(str(error.value)) < 200


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    message = r"a.jpg: must be a whole JPEG or PNG image, got not a regular file"
    with in_time(5), pytest.raises(UserError, match=message):
        read_image(tmp_path / "a.jpg")


def test_what_pil_only_warns_of_is_not_told(tmp_path, recwarn):
    saved(tmp_path / "a.png", "P", transparency=b"\x80\xff")
    assert read_image(tmp_path / "a.png").shape == (4, 6, 3)
    assert not recwarn.list


def test_damaged_exif_is_an_error_only_where_it_is_needed_and_no_warning(tmp_path, recwarn):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.jpg", "RGB", exif=exif)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"MM\0*", b"MM\0\0").replace(b"II*\0", b"II\0\0"))
    assert read_image(path).shape == (4, 6, 3)
    with contextlib.suppress(UserError):
        read_image(path, exif=True)
    assert not recwarn.list
