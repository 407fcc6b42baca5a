"""An image as a user has it, a file, a PIL image or an array, as the engines take it: upright RGB.

Without torch, and of every format that PIL reads; `lbdet.data.images` is for data sets, whose boxes are in
stored pixels, and knows JPEG and PNG.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from lbdet.errors import UserError

Picture = np.ndarray | Image.Image | str | os.PathLike[str]
"""uint8 `[H, W, 3]` RGB, or an image of any mode, or the path of one"""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""of the files that are taken from a folder"""


def read_picture(picture: Picture) -> np.ndarray:
    """Return uint8 `[H, W, 3]`, RGB, contiguous: turned as EXIF says, transparency dropped, of several frames
    the first; 16-bit grey loses its lower byte. An array is taken as it is.

    Raises:
        UserError: an array of another shape or type; a file that is missing, damaged or absurdly large.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture)
    if isinstance(picture, Image.Image):
        return _decoded(picture, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture) as image:
                return _decoded(image, picture)
    except FileNotFoundError:
        raise UserError(f"{picture}: image file does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{picture}: image must have at most {Image.MAX_IMAGE_PIXELS} pixels, got more; make it smaller"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # PIL's ways to say damaged
        raise UserError(f"{picture}: must be a whole image file, got {error}") from None


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(
            f"image: an array must be uint8 [H, W, 3] with pixels, got {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array)


def _decoded(image: Image.Image, name: object) -> np.ndarray:
    if not image.width or not image.height:
        raise UserError(f"{name}: must have pixels, got {image.width}x{image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))
