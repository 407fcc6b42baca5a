"""Decoding: every mode becomes RGB, every damage an error."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lbdet.data.images import read_image
from lbdet.errors import UserError

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


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"b.jpg: image file does not exist"):
        read_image(tmp_path / "b.jpg")
    with pytest.raises(UserError, match="must be a whole JPEG or PNG image, got "):
        read_image(tmp_path)


@pytest.mark.parametrize("limit", [20, 10])  # PIL warns above the limit, raises above twice the limit
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    path = saved(tmp_path / "a.png", "RGB")  # 24 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=f"a.png: image must have at most {limit} pixels, got more"):
        read_image(path)
