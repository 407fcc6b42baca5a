"""An image as a user has it, a file, a PIL image or an array, as the engines take it: upright RGB.

Without torch; `lbdet.data.images` is for data sets, whose boxes are in stored pixels, and knows JPEG and PNG.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from lbdet.errors import UserError
from lbdet.images import decode_image, rgb_pixels

Picture = np.ndarray | Image.Image | str | os.PathLike[str]
"""uint8 `[H, W, 3]` RGB, or an image of any mode but floats, or the path of one"""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""that files may have, whatever their name; PIL reads MPO, of cameras with two lenses, as JPEG"""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""of the files that are taken from a folder"""


def read_picture(picture: Picture) -> np.ndarray:
    """Return uint8 `[H, W, 3]`, RGB, contiguous: turned as EXIF says, transparency dropped, of several frames
    the first; 16-bit grey loses its lower byte. An array is taken as it is.

    Raises:
        UserError: an array of another shape or type; a file that is missing, damaged, of another format or
            absurdly large; an image with floats as pixels.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture)
    if isinstance(picture, Image.Image):
        return rgb_pixels(picture, "image", exif=True)
    if os.path.exists(picture) and not os.path.isfile(picture):  # a pipe would be waited for
        raise UserError(f"{picture}: must be an image file, got a folder, a pipe or a device")
    try:
        with open(picture, "rb") as file:
            return decode_image(file, str(picture), FORMATS, exif=True)
    except (FileNotFoundError, ValueError):  # ValueError: a name with a NUL
        raise UserError(f"{picture}: image file does not exist") from None
    except OSError as error:
        raise UserError(f"{picture}: image file cannot be read, got {error.strerror}") from None


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(
            f"image: an array must be uint8 [H, W, 3] with pixels, got {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array)
