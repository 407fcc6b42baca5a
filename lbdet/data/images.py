"""Decode an image file, strictly: a damaged file is an error, never a grey stripe.

PIL and not cv2: `cv2.imread` returns None for a missing file and silently fills up a truncated one. (What no
decoder can tell is a JPEG damaged inside: it has no checksums.)
"""

from __future__ import annotations

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lbdet.data.files import open_regular, reason
from lbdet.errors import UserError, one_line, short

MAX_PIXELS = (1 << 30) // 12
"""Of an image: 89 million, PIL's own limit. Decoding the largest takes less than 1.5 GiB."""
MAX_SIDE = 1 << 24
"""Of an image in pixels: as far as float32 holds every whole number."""
_FORMATS = ("JPEG", "PNG")


def read_image(path: str | os.PathLike[str], exif: bool = False) -> np.ndarray:
    """Decode a JPEG or PNG of any mode as RGB; transparency is dropped, 16-bit grey loses its lower byte.

    Boxes of data sets are in stored pixels, so the EXIF orientation must not be applied to their images.

    Args:
        path: the file.
        exif: turn the image upright as its EXIF orientation says (for a user's own photographs).

    Returns:
        uint8 `[H, W, 3]`, a new writeable array.

    Raises:
        UserError: for a file that is missing, damaged, truncated, of another format or absurdly large.
    """
    try:
        with open_regular(path) as file:
            return decode_image(file, str(path), exif=exif)
    except FileNotFoundError as error:
        raise UserError(f"{path}: image file does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"{path}: must be a whole JPEG or PNG image, got {reason(error)}") from error


def decode_image(
    file: BinaryIO, where: str, formats: tuple[str, ...] = _FORMATS, exif: bool = False
) -> np.ndarray:
    """Decode an open file as `read_image` does.

    Args:
        where: what an error calls it.
        formats: some of "JPEG" and "PNG".

    Raises:
        UserError: as `read_image`.
    """
    kinds = " or ".join(formats)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what PIL only warns of, such as damaged EXIF, is no damage to us
            with Image.open(file, formats=formats) as image:
                check_pixels(where, *image.size)
                return np.array(_to_rgb(ImageOps.exif_transpose(image) if exif else image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where}: image must have 1 to {MAX_PIXELS} pixels, got far more; make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: must be a whole {kinds} image, got another kind of file") from error
    except Exception as error:  # damaged bytes can raise nearly anything in the decoders
        raise UserError(
            f"{where}: must be a whole {kinds} image, got {one_line(reason(error), 200)}"
        ) from error


def check_pixels(where: str, width: int, height: int) -> None:
    """Refuse a size that no image may have; nothing needs to be decoded for that.

    Raises:
        UserError: a side of 0 pixels or of more than `MAX_SIDE`, or more than `MAX_PIXELS`.
    """
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise UserError(
            f"{where}: image must have 1 to {MAX_PIXELS} pixels, got {short(width)}x{short(height)}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # PIL would clip 16-bit grey at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
