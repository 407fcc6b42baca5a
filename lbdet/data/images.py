"""Read the images of data sets: JPEG and PNG, in stored pixels, which are those of the boxes."""

from __future__ import annotations

import os

import numpy as np

from lbdet.data.files import open_regular, reason
from lbdet.errors import UserError
from lbdet.images import decode_image

_FORMATS = ("JPEG", "PNG")


def read_image(path: str | os.PathLike[str], exif: bool = False) -> np.ndarray:
    """Decode a JPEG or PNG as RGB, as `lbdet.images.decode_image` does.

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
            return decode_image(file, str(path), _FORMATS, exif)
    except FileNotFoundError as error:
        raise UserError(f"{path}: image file does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"{path}: must be a whole JPEG or PNG image, got {reason(error)}") from error
