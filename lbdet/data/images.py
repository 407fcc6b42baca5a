"""Decode an image file, strictly: a damaged file is an error, never a grey stripe.

PIL and not cv2: `cv2.imread` returns None for a missing file and silently fills up a truncated one.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from lbdet.errors import UserError

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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                upright = ImageOps.exif_transpose(image) if exif else image
                return np.array(_to_rgb(upright))
    except FileNotFoundError as error:
        raise UserError(f"{path}: image file does not exist") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{path}: image must have at most {Image.MAX_IMAGE_PIXELS} pixels, got more; make it smaller"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # PIL's ways to say damaged
        raise UserError(f"{path}: must be a whole JPEG or PNG image, got {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # PIL would clip 16-bit grey at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
