"""From an image file or a PIL image to RGB, strictly: damage is an error, never a grey stripe. Without torch.

PIL and not cv2: `cv2.imread` returns None for a missing file and silently fills up a truncated one. (What no
decoder can tell is a JPEG damaged inside: it has no checksums.) PIL is told which formats it may take: left
to choose by the content, it would start Ghostscript on PostScript that is called photo.jpg.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lbdet.errors import UserError, one_line, short

MAX_PIXELS = (1 << 30) // 12
"""Of an image: 89 million, PIL's own limit. Decoding the largest takes less than 1.5 GiB."""
MAX_SIDE = 1 << 24
"""Of an image in pixels: as far as float32 holds every whole number."""


def decode_image(file: BinaryIO, where: str, formats: tuple[str, ...], exif: bool = False) -> np.ndarray:
    """Decode an open file as RGB; of several frames the first. Modes become RGB as in `rgb_pixels`.

    Args:
        where: what an error calls it.
        formats: PIL's names of those that it may have.
        exif: turn the image upright as its EXIF orientation says.

    Returns:
        uint8 `[H, W, 3]`, a new writeable array.

    Raises:
        UserError: for a file that is damaged, truncated, of another format or absurdly large.
    """
    kinds = " or ".join(filter(None, [", ".join(formats[:-1]), formats[-1]]))
    with _damage_told(where, f"a whole {kinds} image"), Image.open(file, formats=formats) as image:
        return _pixels(image, where, exif)


def rgb_pixels(image: Image.Image, where: str, exif: bool = False) -> np.ndarray:
    """Convert a PIL image of any mode but floats: transparency is dropped, 16-bit grey loses its lower byte.

    Grey in 32 bits is taken as 8-bit where no pixel is above 255, and else as 16-bit.

    Args, Returns: as `decode_image`.

    Raises:
        UserError: an image that cannot be decoded, is absurdly large, or whose pixels fit no 16 bits.
    """
    with _damage_told(where, "a whole image"):
        return _pixels(image, where, exif)


def check_pixels(where: str, width: int, height: int) -> None:
    """Refuse a size that no image may have; nothing needs to be decoded for that.

    Raises:
        UserError: a side of 0 pixels or of more than `MAX_SIDE`, or more than `MAX_PIXELS`.
    """
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise UserError(
            f"{where}: image must have 1 to {MAX_PIXELS} pixels, got {short(width)}x{short(height)}"
        )


def _pixels(image: Image.Image, where: str, exif: bool) -> np.ndarray:
    check_pixels(where, *image.size)
    return np.array(_to_rgb(ImageOps.exif_transpose(image) if exif else image, where))


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{where}: image must have whole numbers as pixels, got floats; save it in 8 bits")
    if image.mode.startswith("I"):  # PIL would clip 16-bit grey at 255
        image = Image.fromarray(_upper_byte(np.asarray(image), image.mode != "I", where))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _upper_byte(grey: np.ndarray, is_16_bit: bool, where: str) -> np.ndarray:
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 0xFFFF:
        raise UserError(f"{where}: grey pixels must lie in 0..65535, got {low}..{high}; save it in 8 bits")
    return (grey >> 8 if is_16_bit or high > 0xFF else grey).astype(np.uint8)


@contextmanager
def _damage_told(where: str, rule: str) -> Iterator[None]:
    """Let whatever the decoders raise be one kind of error, and what they only warn of be silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where}: image must have 1 to {MAX_PIXELS} pixels, got far more; make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: must be {rule}, got another kind of file") from error
    except Exception as error:  # damaged bytes can raise nearly anything in the decoders
        got = one_line(str(error) or type(error).__name__, 200)
        raise UserError(f"{where}: must be {rule}, got {got}") from error
